"""Text to batches, each a pure function of (seed, rows seen).

source -> documents -> split -> tokenizer -> token cache -> rows -> Grain shuffle, repeat, mix
  -> Batch

A split is one stream: eod document eod document ... The end-of-document token opens a document, so
a document's first token is predicted from eod alone, its last one predicts eod, and every token of
the text is predicted once. Rows are cut from the stream without padding. A mixture has a pair of
streams for each task, all cut by one tokenizer; a row is of one task, a batch of several.

Letters: B batch, S sequence.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from moejax.config import check, problem_if
from moejax.config.decimals import decimal_of
from moejax.data.batch import Batch
from moejax.data.held_out_rows import HeldOutDocuments, HeldOutRows, held_out_documents
from moejax.data.holdout import digest_of
from moejax.data.position import Stretch, rows_seen
from moejax.data.rows import Rows, batch_from_rows
from moejax.data.sources import DataConfig
from moejax.data.special_tokens import OWN, SpecialTokens
from moejax.data.token_cache import cache_directory
from moejax.data.token_stream import (
  Text,
  digest_of_split,
  digest_of_texts,
  name_task_in_errors,
  open_stream,
  open_tokenizer,
  read_side,
  survey_texts,
)
from moejax.data.tokenizer import Tokenizer


class Size(NamedTuple):
  """How much text: counts of tokens predicted, and of the UTF-8 bytes behind them."""

  train_tokens: int  # in one epoch
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float  # of the training text


class Streams(NamedTuple):
  """Both sides of a task's text as token ids."""

  train: Rows
  validation: Rows


@dataclass(frozen=True)
class Data:
  """An opened source, or mixture: training batches by step, and the validation in order."""

  tokenizer: Tokenizer
  tasks: tuple[str, ...]  # as DataConfig.tasks
  sizes: tuple[Size, ...]  # of each task
  totals: Size  # of all tasks together; bytes_per_token of the training text as it is mixed
  fingerprint: dict[str, str]  # of all that shapes the batches; see checkpoint/fingerprint.py
  batch_size: int
  stretches: tuple[Stretch, ...]  # of the run, so that step -> rows seen
  train_rows: grain.MapDataset  # [i] -> ([S + 1] ids, task), shuffled, mixed, without end
  held_out: HeldOutRows
  documents: HeldOutDocuments  # that are held out
  read_split: Callable[[bool], bytes]  # whether held out -> the text of that side, read anew

  @property
  def vocab_size(self) -> int:
    """The number of ids, eod included."""
    return self.tokenizer.vocab_size

  @property
  def train_tokens(self) -> int:
    """Training tokens of all tasks, in one epoch of each."""
    return self.totals.train_tokens

  @property
  def train_bytes(self) -> int:
    """Bytes of the training text of all tasks."""
    return self.totals.train_bytes

  @property
  def validation_tokens(self) -> int:
    """Held-out tokens of all tasks."""
    return self.totals.validation_tokens

  @property
  def validation_bytes(self) -> int:
    """Bytes of the held-out text of all tasks."""
    return self.totals.validation_bytes

  @property
  def bytes_per_token(self) -> float:
    """Bytes behind a token of the training text, as it is mixed."""
    return self.totals.bytes_per_token

  def batch(self, step: int, rows: Sequence[int] = ()) -> Batch:
    """Returns training batch number `step`, the same whatever was asked for before.

    Epochs follow each other without a seam: a batch may hold the end of one and the start of the
    next. So do batches of other sizes, where `stretches` has some.

    Args:
      step: from 0, without end.
      rows: which rows of the batch; (): all.
    """
    first = rows_seen(self.stretches, step)
    picked = [self.train_rows[first + row] for row in rows or range(self.batch_size)]
    ids, tasks = zip(*picked)
    eod, closes = self.tokenizer.eod_id, bool(self.tokenizer.closing)
    return batch_from_rows(np.stack(ids), np.stack(tasks), eod, closes)

  def validation(self, max_batches: int = 0, rows: Sequence[int] = ()) -> Iterator[Batch]:
    """Yields the held-out streams, each in order, the last row of each and the last batch padded.

    The streams of a mixture are interleaved such that they end together.

    Args:
      max_batches: yields so many batches, evenly spaced; 0: all. The batches in which the streams
        start are always among them: every task is seen, if as many rows are asked for as there are
        tasks.
      rows: which rows of each batch; (): all.
    """
    return self.held_out.batches(max_batches, rows)

  def validation_documents(self, max_batches: int = 0) -> Iterator[np.ndarray]:
    """Yields the document of each target of `validation`'s batches, all rows: [B, S].

    A number in `documents`, or NO_DOCUMENT where nothing is to be predicted.
    """
    return self.held_out.documents(max_batches)

  def train_text(self) -> bytes:
    """Returns the training text, read anew, as for a compressor's dictionary; of much, the end.

    Raises:
      ConfigError: the text has changed since it was opened.
    """
    return self.read_split(False)

  def validation_text(self) -> bytes:
    """Returns the held-out text; otherwise as `train_text`."""
    return self.read_split(True)


def open_data(
  cfg: DataConfig, *, batch_size: int, seq_len: int, seed: int, special: SpecialTokens = OWN
) -> Data:
  """Prepares what the cache lacks, seconds the first time, and opens the streams.

  Several processes may call it at once.

  Args:
    cfg: which text, and which tokenizer.
    batch_size: rows of a batch, B.
    seq_len: tokens of a row, S.
    seed: of the order of rows.
    special: of the published model that goes on here.

  Raises:
    ConfigError: text is absent, unreadable or too short.
  """
  cache = cache_directory(cfg.cache_dir)
  texts = survey_texts(cfg, cache, special)
  tokenizer = open_tokenizer(cfg.tokenizer, texts, cache, special)
  streams = []
  for text in texts:
    with name_task_in_errors(cfg, text.component):
      of_text = _open_streams(text, tokenizer, cache, seq_len)
      _check_lengths(of_text, batch_size, text.component.weight)
    streams.append(of_text)
  train, validation = zip(*streams)
  weights = [text.component.weight for text in texts]
  datasets = [_shuffled(rows, task, seed) for task, rows in enumerate(train)]
  mixed = grain.MapDataset.mix(datasets, weights)  # rounds weights to 1% of the least
  fingerprint = _fingerprint_of_text(cfg, texts) | {
    'seed': str(seed),
    'tokenizer_digest': tokenizer.digest,
    'train_tokens': str(_length(train)),
    'validation_tokens': str(_length(validation)),
    'batch_size': str(batch_size),
    'seq_len': str(seq_len),
    # Tells of another order of rows, should Grain's ever change.
    'first_batch': digest_of(b''.join(mixed[i][0] for i in range(batch_size))),
  }
  sizes = tuple(_size(text, of_text) for text, of_text in zip(texts, streams))
  return Data(
    tokenizer=tokenizer,
    tasks=cfg.tasks,
    sizes=sizes,
    totals=_total(sizes, weights),
    fingerprint=fingerprint,
    batch_size=batch_size,
    stretches=(Stretch(0, batch_size, seq_len),),
    train_rows=mixed,
    held_out=HeldOutRows(validation, batch_size, tokenizer.eod_id, bool(tokenizer.closing)),
    documents=held_out_documents([text.survey for text in texts]),
    read_split=functools.partial(read_side, texts),
  )


def _fingerprint_of_text(cfg: DataConfig, texts: Sequence[Text]) -> dict[str, str]:
  """Returns the part of a fingerprint that tells which text is read, and how it is split."""
  fingerprint = {
    'source': cfg.source,
    'source_digest': digest_of_texts(texts),
    'held_out': digest_of_split(texts),
    'tokenizer': Path(cfg.tokenizer).name,
  }
  if cfg.mixture:
    shares = [f'{text.component.task}={text.component.weight}' for text in texts]
    fingerprint['mixture'] = ' '.join(shares)
  return fingerprint


def _length(sides: Sequence[Rows]) -> int:
  """Returns the token ids of one side of all tasks."""
  return sum(len(rows.stream) for rows in sides)


def _open_streams(text: Text, tokenizer: Tokenizer, cache: Path, seq_len: int) -> Streams:
  """Returns both sides of a text, tokenised where the cache does not have them."""
  train, validation = (open_stream(text, tokenizer, cache, side) for side in (False, True))
  return Streams(Rows(train, seq_len), Rows(validation, seq_len))


def _check_lengths(streams: Streams, batch_size: int, weight: float) -> None:
  """Raises ConfigError where a batch would draw a row twice, or there is nothing to validate on."""
  train, validation = streams
  seq_len = train.seq_len
  drawn = math.ceil(batch_size * decimal_of(weight))
  share = f' draws {drawn} of them' if drawn < batch_size else ''
  check(
    problem_if(
      len(train) < drawn,
      f'the training text has {len(train.stream)} tokens, {len(train)} rows of seq_len={seq_len}, '
      f'but batch_size={batch_size}{share}; give more text or lower seq_len or batch_size',
    ),
    problem_if(
      len(validation) == 0,
      f'the held-out text has {len(validation.stream)} tokens, less than one row of '
      f'seq_len={seq_len}; give more text or lower seq_len',
    ),
  )


def _size(text: Text, streams: Streams) -> Size:
  """Returns how much text a task has."""
  train, validation = streams
  return Size(
    train_tokens=len(train) * train.seq_len,
    train_bytes=text.survey.train_bytes,
    # Of a stream every token but the first is predicted.
    validation_tokens=len(validation.stream) - 1,
    validation_bytes=text.survey.validation_bytes,
    bytes_per_token=text.survey.train_bytes / (len(train.stream) - 1),
  )


def _total(sizes: Sequence[Size], weights: Sequence[float]) -> Size:
  """Returns the size of all tasks together; bytes per token are those of the rows as mixed."""
  *counts, bytes_per_token = zip(*sizes)
  weighted = [weight * of_task for weight, of_task in zip(weights, bytes_per_token)]
  return Size(*map(sum, counts), bytes_per_token=sum(weighted))


def _shuffled(rows: Rows, task: int, seed: int) -> grain.MapDataset:
  """Returns [i] -> (row, task) of a task, in another order in each epoch, without end."""
  # The first task has no number in its seed: a source alone has the order of a mixture of one.
  parts = ('order', seed) if task == 0 else ('order', seed, task)
  # Not the seed itself: Grain adds the epoch to it, and the epochs of seeds 0 and 1 would overlap.
  order = int(digest_of(*parts)[:8], 16)
  return grain.MapDataset.source(rows).shuffle(seed=order).repeat().map(_pair_with(task))


def _pair_with(task: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.int32]]:
  return lambda row: (row, np.int32(task))
