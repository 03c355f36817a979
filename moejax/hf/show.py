"""What published files hold, as a table for a person; no tensor is read."""

from collections import Counter

import jax
from rich.console import Console
from rich.table import Table

from moejax.config.fields import walk_fields
from moejax.hf.import_model import run_config
from moejax.hf.safetensors.directory import Tensors
from moejax.hf.weights import open_published
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.train.experiment.cost import count_parameters
from moejax.train.experiment.run_dir import TOKENIZER_FILE, read_tokenizer


def show(directory: str) -> None:
  """Prints what a published model is, after its names and shapes have been checked.

  Raises:
    ConfigError: the files contradict their config.json, or cannot be trusted.
  """
  source = open_published(directory)
  stored, cfg = source.tensors, source.cfg
  # Parameters are counted on shapes: nothing is allocated.
  shapes = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
  count = count_parameters(shapes, run_config(cfg, ''))
  tokenizer = read_tokenizer(directory, cfg.vocab_size)
  files = {stored.path(name) for name in stored.names}
  # On the disk, with headers, and before blocks with scales are unpacked.
  nbytes = sum(path.stat().st_size for path in files)
  facts: dict[str, object] = {
    'family': source.known.model_type,
    'parameters': f'{count.total - count.mtp:,}, {count.active:,} of them active; '
    f'{count.mtp:,} more for multi-token prediction',
    'tensors': tensor_kinds(stored),
    'files': f'{len(files)}, {nbytes:,} bytes',
    'tokenizer': f'{tokenizer.vocab_size:,} tokens' if tokenizer else f'no {TOKENIZER_FILE}',
  }
  table = Table('', directory)
  for name, value in (facts | unusual_fields(cfg)).items():
    table.add_row(name, str(value))
  Console().print(table)


def tensor_kinds(stored: Tensors) -> str:
  """Returns how many tensors there are of each dtype, most first, as '12 BF16, 3 F32'."""
  kinds: Counter[str] = Counter()
  for name in stored.names:
    blocks = ' from blocks with scales' if stored.is_quantised(name) else ''
    kinds[stored.dtype(name) + blocks] += 1
  return ', '.join(f'{number:,} {kind}' for kind, number in kinds.most_common())


def unusual_fields(cfg: ModelConfig) -> dict[str, object]:
  """Returns dotted path -> value of every field that does not have its default."""
  plain = dict(walk_fields(ModelConfig()))
  return {path: value for path, value in walk_fields(cfg) if value != plain[path]}
