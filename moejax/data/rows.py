"""Rows of a token stream, and the batch that some of them make.

Letters: B batch, S sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moejax.data.batch import IGNORE, Batch, make_batch
from moejax.data.token_files import Ids

PAST_END = -1  # in place of an id, where a row is longer than what its stream has left


@dataclass(frozen=True)
class Rows:
  """A stream cut into rows of S inputs and one target more, for Grain to shuffle.

  A row's last target is the next row's first input. A tail that is shorter than a row is left out.
  """

  stream: Ids  # [n]
  seq_len: int  # S

  def __len__(self) -> int:
    return max(len(self.stream) - 1, 0) // self.seq_len

  def __getitem__(self, i: int) -> np.ndarray:
    """Returns row i, [S + 1] i32."""
    return self.stream[i * self.seq_len : (i + 1) * self.seq_len + 1].astype(np.int32)


def batch_from_rows(
  rows: np.ndarray, task_ids: np.ndarray, eod_id: int, closes: bool = False
) -> Batch:
  """Returns the batch of some rows of streams.

  An end-of-document token opens a document, or closes it; a row may start inside one.

  Args:
    rows: [B, S + 1] ids, PAST_END beyond the end of a stream.
    task_ids: [B].
    eod_id: the end-of-document token, which is also in the place of padding.
    closes: whether that token is the last of its document, and not the first.
  """
  tokens, targets = rows[:, :-1], rows[:, 1:]
  # A token without a target is padding: it is the last of its stream, or beyond.
  is_real = targets != PAST_END
  opens = tokens == eod_id
  if closes:  # then the token after it opens the next document
    opens = np.pad(opens[:, :-1], ((0, 0), (1, 0)))
  opens &= is_real
  # The document that a row starts in is its first, whether it opens there or was open already.
  segments = np.cumsum(opens, axis=1, dtype=np.int32) + ~opens[:, :1]
  return make_batch(
    tokens=np.where(is_real, tokens, eod_id),
    targets=np.where(is_real, targets, IGNORE),
    segment_ids=np.where(is_real, segments, 0),
    task_ids=task_ids,
  )


def document_openings(ids: np.ndarray, eod_id: int, closes: bool = False) -> np.ndarray:
  """Returns where in a stream [n] the documents open, in order, its start among them.

  The last token opens nothing: no token comes after it. For closes see `batch_from_rows`.
  """
  opens = ids == eod_id
  if closes:
    opens = np.pad(opens[:-1], (1, 0))
  openings = np.flatnonzero(opens[:-1])
  return openings if len(openings) and openings[0] == 0 else np.insert(openings, 0, 0)


def spaced_batches(num_batches: int, max_batches: int, last_opening: int) -> Iterator[int]:
  """Yields the numbers of some batches of a validation, in order, each once.

  All up to `last_opening` come first, as far as `max_batches` allows; the others are evenly spaced.

  Args:
    num_batches: how many there are.
    max_batches: how many are wanted; 0: all.
    last_opening: the last one that is wanted in any case.
  """
  wanted = min(max_batches, num_batches) or num_batches
  for i in range(wanted):
    if i < last_opening:
      yield i
    else:
      passed = (i - last_opening) * (num_batches - last_opening) // (wanted - last_opening)
      yield last_opening + passed
