"""Models of the published families, in and out of run directories.

  python -m moejax.hf import SRC --out=DIR [--mesh.expert=4] [--dtype=bfloat16]
  python -m moejax.hf export --workdir=DIR --out=DST_DIR [--family=deepseek_v3] [--dtype=bfloat16]
  python -m moejax.hf logits --model=SRC --tokens=ids.npy --out=logits.npy
  python -m moejax.hf show SRC

SRC is a directory of published files, config.json and safetensors, or ORG/NAME of the Hugging Face
hub, from where they are fetched. What an import makes is the run directory of a model at step 0:
`generate` runs on it, and training starts from it with --config.init_from=DIR. Nothing is
unpickled, and no code in a model's directory is run.

Imports and exports may be many processes, each started with the same arguments and
--coordinator=HOST:PORT --num_processes=N --process_id=I, or by TPU and Slurm, as in training.
"""

import argparse
import sys
from collections.abc import Sequence

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError, check, local_path, problem_if
from moejax.hf.export_model import export_model
from moejax.hf.hub import fetched
from moejax.hf.import_model import import_model
from moejax.hf.logits import write_logits
from moejax.hf.safetensors.file import MODEL_DTYPES
from moejax.hf.show import show
from moejax.runtime.command import CommandParser, run_quietly, usage_error
from moejax.runtime.launch import Launch, connect, read_launch_flags
from moejax.runtime.multiprocess import check_alike
from moejax.sharding.mesh import MeshConfig

# Arguments that are paths -> how they are typed.
PATHS = {
  'directory': 'SRC',
  'out': '--out',
  'workdir': '--workdir',
  'model': '--model',
  'tokens': '--tokens',
}
MAY_BE_ON_THE_HUB = ('directory', 'model')
TOGETHER = ('import', 'export')  # commands that many processes may run as one
SPLIT_AXES = ('fsdp', 'expert', 'tensor')  # over which parameters are split; `data` repeats them


def argument_parser() -> argparse.ArgumentParser:
  """Returns the parser of the four commands and their flags."""
  parser = CommandParser(prog='python -m moejax.hf', description='Published models.')
  commands = parser.add_subparsers(dest='command', required=True)
  source, dtypes = 'a directory with config.json and safetensors, or ORG/NAME', [*MODEL_DTYPES]
  add = commands.add_parser('import', help='published files -> the directory of a run')
  add.add_argument('directory', metavar='SRC', help=source)
  add.add_argument('--out', required=True, help='directory to make')
  for axis in SPLIT_AXES:
    add.add_argument(
      f'--mesh.{axis}', type=int, default=1, help='devices that hold the model while it is read'
    )
  half = 'of the parameters; bfloat16 takes half the room, and is what most files hold'
  add.add_argument('--dtype', choices=dtypes, default='float32', help=half)
  add = commands.add_parser('export', help='the newest checkpoint of a run -> published files')
  add.add_argument('--workdir', required=True, help='directory of the run')
  add.add_argument('--out', required=True, help='directory to make')
  add.add_argument(
    '--family', default='', help='model_type; needed where several can hold the model'
  )
  add.add_argument('--dtype', default='', help='of the tensors; as imported, or float32, without')
  add = commands.add_parser('logits', help='token ids [B, S] -> logits [B, S, V]')
  add.add_argument('--model', required=True, help=f'{source}; or the directory of a run')
  add.add_argument('--tokens', required=True, help='.npy of whole numbers')
  add.add_argument('--out', required=True, help='.npy to write')
  add = commands.add_parser('show', help='what published files hold')
  add.add_argument('directory', metavar='SRC', help=source)
  return parser


def run_command(command: str, args: dict[str, str | int]) -> None:
  """Runs one of the commands with its flags, by name as they are typed."""
  match command:
    case 'import':
      sizes = {axis: args[f'mesh.{axis}'] for axis in SPLIT_AXES}
      import_model(args['directory'], args['out'], MeshConfig(data=1, **sizes), args['dtype'])
    case 'export':
      export_model(args['workdir'], args['out'], args['family'], args['dtype'])
    case 'logits':
      write_logits(args['model'], args['tokens'], args['out'])
    case 'show':
      show(args['directory'])


def join_others(command: str, launch: Launch, argv: Sequence[str]) -> None:
  """Connects to the other processes of the command, if there are any.

  Raises:
    ConfigError: they cannot be reached, have other arguments, or the command is for one process.
  """
  if command in TOGETHER:
    connect(launch)
    check_alike('the command', ' '.join(argv))
  else:
    problem = f'{command} is for one process: leave out --coordinator'
    check(problem_if(launch.coordinator, problem))


def main(argv: Sequence[str]) -> int:
  """Parses and runs. Returns 0, 2 for bad input, or 3 where a run has no loadable checkpoint."""
  try:
    launch, rest = read_launch_flags([*argv])
    args = vars(argument_parser().parse_args(rest))
    command = args.pop('command')
    join_others(command, launch, rest)
    for name in PATHS.keys() & args:
      args[name] = str(local_path(PATHS[name], args[name]))
    for name in args.keys() & MAY_BE_ON_THE_HUB:
      args[name] = fetched(args[name])
    run_command(command, args)
  except (ConfigError, NoLoadableCheckpoint, SaveFailed, OSError) as error:
    print(usage_error('moejax.hf', error), file=sys.stderr)
    return 3 if isinstance(error, NoLoadableCheckpoint) else 2
  return 0


if __name__ == '__main__':
  sys.exit(run_quietly(main, sys.argv[1:]))
