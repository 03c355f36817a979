"""Models of the published families, in and out of run directories, by way of config.json and safetensors.

  python -m moejax.hf import SRC_DIR --out=DIR [--mesh.expert=4]
  python -m moejax.hf export --workdir=DIR --out=DST_DIR [--family=deepseek_v3] [--dtype=bfloat16]
  python -m moejax.hf logits --model=SRC_DIR --tokens=ids.npy --out=logits.npy
  python -m moejax.hf show SRC_DIR

What an import makes is the run directory of a model at step 0: `generate` runs on it, and training starts from it with
--config.init_from=DIR. Nothing is unpickled, and no code in a model's directory is run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError
from moejax.config.fields import walk_fields
from moejax.hf.export_model import EXPORT_DTYPES, export_model
from moejax.hf.import_model import import_model, run_config
from moejax.hf.logits import write_logits
from moejax.hf.weights import open_published
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.cost import count_parameters
from moejax.train.experiment.run_dir import TOKENIZER_FILE, read_tokenizer


def show(directory: str) -> None:
  """Prints what a published model is; names and shapes are checked, and no tensor is read."""
  source = open_published(directory)
  stored, cfg = source.tensors, source.cfg
  shapes = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
  count = count_parameters(shapes, run_config(cfg, ''))
  tokenizer = read_tokenizer(directory, cfg.vocab_size)
  files = {stored.path(name) for name in stored.names}
  kinds = Counter(
    stored.dtype(name) + ' from blocks with scales' * stored.is_quantised(name)
    for name in stored.names
  )
  facts = {
    'family': source.known.model_type,
    'parameters': f'{count.total - count.mtp:,}, {count.active:,} of them active; '
    f'{count.mtp:,} more for multi-token prediction',
    'tensors': ', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common()),
    'files': f'{len(files)}, {sum(path.stat().st_size for path in files):,} bytes',
    'tokenizer': f'{tokenizer.vocab_size:,} tokens' if tokenizer else f'no {TOKENIZER_FILE}',
  }
  table = Table('', directory)
  for name, value in (facts | unusual(cfg)).items():
    table.add_row(name, str(value))
  Console().print(table)


def unusual(cfg: ModelConfig) -> dict[str, object]:
  """Dotted path -> value of every field that does not have its default."""
  plain = dict(walk_fields(ModelConfig()))
  return {path: value for path, value in walk_fields(cfg) if value != plain[path]}


def main(argv: Sequence[str]) -> int:
  """Parses and runs. Returns the exit status: 0, 2 for bad input, 3 without a loadable checkpoint."""
  parser = argparse.ArgumentParser(
    prog='python -m moejax.hf', description='Models of the published families.'
  )
  commands = parser.add_subparsers(dest='command', required=True)
  add = commands.add_parser('import', help='published files -> the directory of a run')
  add.add_argument('directory', metavar='SRC_DIR', help='has config.json and safetensors')
  add.add_argument('--out', required=True, help='directory to make')
  for axis in ('fsdp', 'expert', 'tensor'):
    add.add_argument(
      f'--mesh.{axis}', type=int, default=1, help='devices that hold the model while it is read'
    )
  add = commands.add_parser('export', help='the newest checkpoint of a run -> published files')
  add.add_argument('--workdir', required=True, help='directory of the run')
  add.add_argument('--out', required=True, help='directory to make')
  add.add_argument(
    '--family', default='', help='model_type; needed where several can hold the model'
  )
  add.add_argument(
    '--dtype', default='', help=f'{" or ".join(EXPORT_DTYPES)}; as imported, or float32, without it'
  )
  add = commands.add_parser('logits', help='token ids [B, S] -> logits [B, S, V]')
  add.add_argument('--model', required=True, help='published files, or the directory of a run')
  add.add_argument('--tokens', required=True, help='.npy of whole numbers')
  add.add_argument('--out', required=True, help='.npy to write')
  add = commands.add_parser('show', help='what published files hold')
  add.add_argument('directory', metavar='SRC_DIR')
  args = vars(parser.parse_args(argv))
  try:
    match args.pop('command'):
      case 'import':
        sizes = {axis: args[f'mesh.{axis}'] for axis in ('fsdp', 'expert', 'tensor')}
        import_model(args['directory'], args['out'], MeshConfig(data=1, **sizes))
      case 'export':
        export_model(*(args[name] for name in ('workdir', 'out', 'family', 'dtype')))
      case 'logits':
        write_logits(*(args[name] for name in ('model', 'tokens', 'out')))
      case 'show':
        show(args['directory'])
  except (ConfigError, NoLoadableCheckpoint, SaveFailed, OSError) as error:
    print(f'moejax.hf: {error}', file=sys.stderr)
    return 3 if isinstance(error, NoLoadableCheckpoint) else 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
