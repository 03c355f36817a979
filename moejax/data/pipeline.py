"""Text to batches, each a pure function of (seed, step).

source -> documents -> split -> tokenizer -> token cache -> rows -> Grain shuffle, repeat, mix, batch -> Batch
A split is one stream: eod document eod document ... The end-of-document token opens a document, so a
document's first token is predicted from eod alone, its last one predicts eod, and every token of the text
is predicted once. Rows are cut from the stream without padding. A mixture has a pair of streams for each task, all
cut by one tokenizer; a row is of one task, a batch of several.   B batch  S sequence  T tasks
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from moejax.config import check
from moejax.data.batch import IGNORE, Batch, make_batch
from moejax.data.holdout import digest_of, documents_of_split
from moejax.data.sources import DataConfig
from moejax.data.token_stream import _digest, _naming, _stream, _texts, _tokenizer
from moejax.data.tokenizer import Tokenizer

logger = logging.getLogger('moejax')


@dataclass(frozen=True)
class Rows:
  """A stream cut into rows of S inputs and one target more, for Grain to shuffle; a shorter tail is left."""

  stream: np.ndarray
  seq_len: int

  def __len__(self) -> int:
    return max(len(self.stream) - 1, 0) // self.seq_len

  def __getitem__(self, i: int) -> np.ndarray:  # [S + 1] i32
    return self.stream[i * self.seq_len : (i + 1) * self.seq_len + 1].astype(np.int32)


class Size(NamedTuple):
  """How much text: counts of tokens predicted, and of the UTF-8 bytes behind them."""

  train_tokens: int  # in one epoch
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float  # of the training text


@dataclass(frozen=True)
class Data:
  """An opened source, or mixture. Counts are of all tasks together; `sizes` has those of each."""

  tokenizer: Tokenizer
  tasks: tuple[str, ...]  # as DataConfig.tasks
  sizes: tuple[Size, ...]  # of each task
  train_tokens: int  # in one epoch of each
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float  # of the training text, as it is mixed
  fingerprint: dict[str, str]
  _rows: grain.MapDataset
  _validation: tuple[np.ndarray, ...]
  _shape: tuple[int, int]
  _text: Callable[[bool], bytes]

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def batch(self, step: int, rows: Sequence[int] = ()) -> Batch:
    """Training batch number `step`, or rows of it, the same whatever was asked before; epochs follow without a seam."""
    B = self._shape[0]
    return batch_from_rows(
      *map(np.stack, zip(*(self._rows[step * B + row] for row in rows or range(B)))),
      self.tokenizer.eod_id,
    )

  def validation(self, max_batches: int = 0, rows: Sequence[int] = ()) -> Iterator[Batch]:
    """The held-out streams, each in order, the last row of each and the last batch padded; or `max_batches` of it,
    evenly spaced. The streams are interleaved to end together. The batches in which they open are always among those
    asked for, so that every task is seen, if only as many rows are asked for as there are tasks. `rows` as `batch`."""
    B, S = self._shape
    counts = np.array([-(-size.validation_tokens // S) for size in self.sizes])  # [T] rows
    tasks, places = (
      np.repeat(np.arange(len(counts)), counts),
      np.concatenate([np.arange(n) for n in counts]),
    )
    order = np.lexsort((tasks, places / counts[tasks]))
    count, opening = -(-len(order) // B), (len(counts) - 1) // B
    wanted = min(max_batches, count) or count
    for i in range(wanted):
      at = i if i < opening else opening + (i - opening) * (count - opening) // (wanted - opening)
      mine = [at * B + row for row in rows or range(B)]
      ids, task_ids = np.full((len(mine), S + 1), -1, np.int32), np.zeros(len(mine), np.int32)
      for row, chosen in enumerate(order[[place for place in mine if place < len(order)]]):
        task_ids[row], n = tasks[chosen], places[chosen]
        chunk = self._validation[tasks[chosen]][n * S : (n + 1) * S + 1]
        ids[row, : len(chunk)] = chunk
      yield batch_from_rows(ids, task_ids, self.tokenizer.eod_id)

  def train_text(self) -> bytes:
    """The training text, read anew (a compressor's dictionary); ConfigError when it is another by now."""
    return self._text(False)

  def validation_text(self) -> bytes:
    return self._text(True)


def open_data(cfg: DataConfig, *, batch_size: int, seq_len: int, seed: int) -> Data:
  """Prepares what the cache lacks, seconds the first time, and opens the streams.

  Safe to call from several processes at once. ConfigError for text that is absent, unreadable or too short.
  """
  default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'moejax'
  cache = (Path(cfg.cache_dir) if cfg.cache_dir else default).expanduser()
  texts = _texts(cfg, cache)
  tokenizer = _tokenizer(cfg.tokenizer, texts, cache)
  streams, datasets, sizes = [], [], []
  for task, text in enumerate(texts):
    with _naming(cfg, text.component):
      train, validation = (_stream(text, tokenizer, cache, held_out) for held_out in (False, True))
      rows, survey = Rows(train, seq_len), text.survey
      _check_lengths(rows, Rows(validation, seq_len), batch_size, text.component.weight)
    order = ('order', seed) if task == 0 else ('order', seed, task)
    order = int(
      digest_of(*order)[:8], 16
    )  # not the seed: Grain adds the epoch, 0 and 1 would overlap
    datasets.append(grain.MapDataset.source(rows).shuffle(seed=order).repeat().map(_labelled(task)))
    streams.append((train, validation))
    sizes.append(
      Size(
        len(rows) * seq_len,
        survey.train_bytes,
        len(validation) - 1,
        survey.validation_bytes,
        survey.train_bytes / (len(train) - 1),
      )
    )
  weights = [component.weight for component, _, _ in texts]
  mixed = grain.MapDataset.mix(datasets, weights)  # cuts weights to 1% of the least
  fingerprint = {  # its first batch: Grain's order, should it ever change
    'source': cfg.source,
    'source_digest': _digest(texts),
    'tokenizer': Path(cfg.tokenizer).name,
    'seed': str(seed),
    'tokenizer_digest': tokenizer.digest,
    'train_tokens': str(sum(len(train) for train, _ in streams)),
    'validation_tokens': str(sum(len(validation) for _, validation in streams)),
    'batch_size': str(batch_size),
    'seq_len': str(seq_len),
    'first_batch': digest_of(b''.join(mixed[i][0] for i in range(batch_size))),
  }
  if cfg.mixture:
    fingerprint['mixture'] = ' '.join(
      f'{component.task}={component.weight}' for component, _, _ in texts
    )
  return Data(
    tokenizer,
    cfg.tasks,
    tuple(sizes),
    *(sum(counts) for counts in list(zip(*sizes))[:4]),
    sum(weight * size.bytes_per_token for weight, size in zip(weights, sizes)),
    fingerprint,
    mixed,
    tuple(validation for _, validation in streams),
    (batch_size, seq_len),
    lambda held_out: b''.join(
      text.encode() for _, *of in texts for text in documents_of_split(*of, held_out)
    ),
  )


def _check_lengths(train: Rows, held: Rows, batch_size: int, weight: float) -> None:
  """A batch does not draw a row twice, and there is something to validate on."""
  drawn, seq_len = math.ceil(batch_size * weight), train.seq_len
  share = f' draws {drawn} of them' if drawn < batch_size else ''
  check(
    ''
    if len(train) >= drawn
    else f'the training text has {len(train.stream)} tokens, {len(train)} rows of seq_len={seq_len}, but '
    f'batch_size={batch_size}{share}; give more text or lower seq_len or batch_size',
    ''
    if len(held)
    else f'the held-out text has {len(held.stream)} tokens, less than one row of seq_len={seq_len}; '
    f'give more text or lower seq_len',
  )


def _labelled(task: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.int32]]:
  return lambda row: (row, np.int32(task))


def batch_from_rows(rows: np.ndarray, task_ids: np.ndarray, eod_id: int) -> Batch:
  """[B, S + 1] ids of streams, -1 past the end of one, and [B] tasks -> Batch.

  An end-of-document token opens a document; a row may start inside one.
  """
  tokens, targets = rows[:, :-1], rows[:, 1:]
  is_real = targets >= 0
  opens = (tokens == eod_id) & is_real
  segments = np.cumsum(opens, axis=1, dtype=np.int32) + ~opens[:, :1]  # the row's first one is 1
  return make_batch(
    tokens=np.where(is_real, tokens, eod_id),
    targets=np.where(is_real, targets, IGNORE),
    segment_ids=np.where(is_real, segments, 0),
    task_ids=task_ids,
  )
