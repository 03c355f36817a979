"""Models of the published families, in and out of run directories.

  python -m moejax.hf import SRC_DIR --out=DIR [--mesh.expert=4]
  python -m moejax.hf export --workdir=DIR --out=DST_DIR [--family=deepseek_v3] [--dtype=bfloat16]
  python -m moejax.hf logits --model=SRC_DIR --tokens=ids.npy --out=logits.npy
  python -m moejax.hf show SRC_DIR

Published files are config.json and safetensors. What an import makes is the run directory of a
model at step 0: `generate` runs on it, and training starts from it with --config.init_from=DIR.
Nothing is unpickled, and no code in a model's directory is run.
"""

import argparse
import sys
from collections.abc import Sequence

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError, local_path
from moejax.hf.export_model import export_model
from moejax.hf.export_plan import EXPORT_DTYPES
from moejax.hf.import_model import import_model
from moejax.hf.logits import write_logits
from moejax.hf.show import show
from moejax.runtime.command import CommandParser, run_quietly, usage_error
from moejax.sharding.mesh import MeshConfig

# Of all commands, the arguments that are paths.
PATHS = ('directory', 'workdir', 'model', 'tokens', 'out')
SPLIT_AXES = ('fsdp', 'expert', 'tensor')  # over which parameters are split; `data` repeats them


def argument_parser() -> argparse.ArgumentParser:
  """Returns the parser of the four commands and their flags."""
  parser = CommandParser(
    prog='python -m moejax.hf', description='Models of the published families.'
  )
  commands = parser.add_subparsers(dest='command', required=True)
  add = commands.add_parser('import', help='published files -> the directory of a run')
  add.add_argument('directory', metavar='SRC_DIR', help='has config.json and safetensors')
  add.add_argument('--out', required=True, help='directory to make')
  for axis in SPLIT_AXES:
    add.add_argument(
      f'--mesh.{axis}', type=int, default=1, help='devices that hold the model while it is read'
    )
  add = commands.add_parser('export', help='the newest checkpoint of a run -> published files')
  add.add_argument('--workdir', required=True, help='directory of the run')
  add.add_argument('--out', required=True, help='directory to make')
  add.add_argument(
    '--family', default='', help='model_type; needed where several can hold the model'
  )
  dtypes = ' or '.join(EXPORT_DTYPES)
  add.add_argument('--dtype', default='', help=f'{dtypes}; as imported, or float32, without it')
  add = commands.add_parser('logits', help='token ids [B, S] -> logits [B, S, V]')
  add.add_argument('--model', required=True, help='published files, or the directory of a run')
  add.add_argument('--tokens', required=True, help='.npy of whole numbers')
  add.add_argument('--out', required=True, help='.npy to write')
  add = commands.add_parser('show', help='what published files hold')
  add.add_argument('directory', metavar='SRC_DIR')
  return parser


def run_command(command: str, args: dict[str, str | int]) -> None:
  """Runs one of the commands with its flags, by name as they are typed."""
  match command:
    case 'import':
      sizes = {axis: args[f'mesh.{axis}'] for axis in SPLIT_AXES}
      import_model(args['directory'], args['out'], MeshConfig(data=1, **sizes))
    case 'export':
      export_model(args['workdir'], args['out'], args['family'], args['dtype'])
    case 'logits':
      write_logits(args['model'], args['tokens'], args['out'])
    case 'show':
      show(args['directory'])


def main(argv: Sequence[str]) -> int:
  """Parses and runs. Returns 0, 2 for bad input, or 3 where a run has no loadable checkpoint."""
  args = vars(argument_parser().parse_args(argv))
  try:
    for name in PATHS:
      if name in args:
        flag = 'SRC_DIR' if name == 'directory' else f'--{name}'
        args[name] = local_path(flag, args[name])
    run_command(args.pop('command'), args)
  except (ConfigError, NoLoadableCheckpoint, SaveFailed, OSError) as error:
    print(usage_error('moejax.hf', error), file=sys.stderr)
    return 3 if isinstance(error, NoLoadableCheckpoint) else 2
  return 0


if __name__ == '__main__':
  sys.exit(run_quietly(main, sys.argv[1:]))
