"""The held-out streams as batches, in order, and which document each of their tokens is of.

Letters: B batch, S sequence, T tasks, N rows of all held-out streams, D documents in them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moejax.data.batch import Batch
from moejax.data.holdout import Survey
from moejax.data.rows import (
  PAST_END,
  Rows,
  batch_from_rows,
  document_openings,
  spaced_batches,
)

NO_DOCUMENT = -1  # in place of a document's number, where nothing is to be predicted


class HeldOutDocuments(NamedTuple):
  """The documents of all held-out streams, task by task, in the order of reading."""

  num_bytes: np.ndarray  # [D]
  groups: np.ndarray  # [D], near-copies have one number
  tasks: np.ndarray  # [D], task ids


def held_out_documents(surveys: Sequence[Survey]) -> HeldOutDocuments:
  """Returns the documents that the surveys of all tasks hold out."""
  sizes = [survey.validation_sizes for survey in surveys]
  groups = [survey.validation_groups for survey in surveys]
  return HeldOutDocuments(
    num_bytes=np.concatenate(sizes),
    groups=np.concatenate(groups),
    tasks=np.repeat(np.arange(len(surveys)), list(map(len, sizes))),
  )


@dataclass(frozen=True)
class HeldOutRows:
  """The rows of all held-out streams, interleaved such that the streams end together.

  The last row of each stream and the last batch are padded.
  """

  streams: tuple[Rows, ...]  # of each task
  batch_size: int  # B
  eod_id: int
  closes: bool = False  # see `batch_from_rows`

  @cached_property
  def order(self) -> np.ndarray:
    """The task of each row, and its place in the task's own stream. [N, 2]."""
    S = self.streams[0].seq_len
    # Of a stream every token but the first is predicted. Unlike Rows, this has its tail too.
    counts = np.array([math.ceil((len(rows.stream) - 1) / S) for rows in self.streams])  # [T]
    tasks = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([np.arange(count) for count in counts])
    # By the part of its stream that lies before a row; the streams' first rows are in front.
    return np.stack([tasks, places], axis=1)[np.lexsort((tasks, places / counts[tasks]))]

  @cached_property
  def openings(self) -> tuple[np.ndarray, ...]:
    """Where in its stream each document opens, of each task."""
    streams = [rows.stream[0 : len(rows.stream)] for rows in self.streams]
    return tuple(document_openings(stream, self.eod_id, self.closes) for stream in streams)

  def batches(self, max_batches: int, picked: Sequence[int]) -> Iterator[Batch]:
    """Yields batches; see `Data.validation`.

    Args:
      max_batches: how many at most; 0: all.
      picked: which rows of each batch; (): all.
    """
    S = self.streams[0].seq_len
    for numbers in self._numbers(max_batches, picked):
      ids = np.full((len(numbers), S + 1), PAST_END, np.int32)
      task_ids = np.zeros(len(numbers), np.int32)
      for row, (task, place) in enumerate(self.order[numbers[numbers < len(self.order)]]):
        row_ids = self.streams[task][place]
        ids[row, : len(row_ids)] = row_ids
        task_ids[row] = task
      yield batch_from_rows(ids, task_ids, self.eod_id, self.closes)

  def documents(self, max_batches: int) -> Iterator[np.ndarray]:
    """Yields for each batch of `batches` which document each target is of.

    Documents are numbered through all tasks; the end-of-document token that a document's last token
    predicts is of that document.

    Returns:
      [B, S] i64, NO_DOCUMENT where nothing is to be predicted.
    """
    S = self.streams[0].seq_len
    before = np.cumsum([0, *map(len, self.openings)])  # documents of the tasks before
    for numbers in self._numbers(max_batches, ()):
      documents = np.full((len(numbers), S), NO_DOCUMENT)
      for row, (task, place) in enumerate(self.order[numbers[numbers < len(self.order)]]):
        positions = np.arange(place * S, min((place + 1) * S, len(self.streams[task].stream) - 1))
        opened = np.searchsorted(self.openings[task], positions, side='right')
        documents[row, : len(positions)] = before[task] + opened - 1
      yield documents

  def _numbers(self, max_batches: int, picked: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the numbers of each batch's rows in `order`, beyond its end where there is padding."""
    num_batches = math.ceil(len(self.order) / self.batch_size)
    last_opening = (len(self.streams) - 1) // self.batch_size  # where the last stream starts
    rows = np.array(picked or range(self.batch_size))
    for index in spaced_batches(num_batches, max_batches, last_opening):
      yield index * self.batch_size + rows
