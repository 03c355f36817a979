"""A mixture of three tasks, each with letters of its own, and its rows."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig

S, B = 16, 6

LETTERS = {
  'code': 'abc',
  'maths': 'pqrs',
  'notes': 'xyz火',
}  # each task its own: a row's letters tell its text

EOD = 256


def mixture_config(mixed_folder: Path, weights: dict[str, float], **fields: object) -> DataConfig:
  table = frozendict(
    {task: f'{weight} text {mixed_folder}/{task}/*' for task, weight in weights.items()}
  )
  usual = {
    'source': 'mixture',
    'mixture': table,
    'tokenizer': 'bytes',
    'cache_dir': f'{mixed_folder}/cache',
  }
  return DataConfig(**usual | fields)


def open_mixture(
  mixed_folder: Path,
  weights: dict[str, float] | None = None,
  batch_size: int = B,
  seq_len: int = S,
  seed: int = 0,
  **fields: object,
) -> Data:
  config = mixture_config(mixed_folder, weights or {'code': 5, 'maths': 3, 'notes': 2}, **fields)
  return open_data(config, batch_size=batch_size, seq_len=seq_len, seed=seed)


def open_task_alone(mixed_folder: Path, task: str) -> Data:
  config = DataConfig(
    source='text',
    path=f'{mixed_folder}/{task}/*',
    tokenizer='bytes',
    cache_dir=f'{mixed_folder}/plain',
  )
  return open_data(config, batch_size=1, seq_len=S, seed=0)


def equal(a: Batch, b: Batch) -> bool:
  return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def rows_of(batches: Iterable[Batch]) -> list[tuple[int, tuple[int, ...]]]:
  """(task, the tokens and the last target) of every row that holds some text."""
  return [
    (int(task), (*tokens[mask].tolist(), int(targets[mask][-1])))
    for batch in batches
    for tokens, targets, mask, *_, task in zip(*batch)
    if mask.any()
  ]
