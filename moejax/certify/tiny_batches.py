"""Batches for the tiny model that hold the same text in another way.

Letters: B batch, S sequence.
"""

import numpy as np

from moejax.certify import tiny_config
from moejax.data.batch import IGNORE, Batch, make_batch


def widened_batch(narrow: Batch, columns: int = 5) -> Batch:
  """A batch with columns of padding on its right, that hold garbage."""
  padding = ((0, 0), (0, columns))
  return make_batch(
    np.pad(narrow.tokens, padding, constant_values=7),
    np.pad(narrow.targets, padding, constant_values=IGNORE),
    np.pad(narrow.segment_ids, padding),
    np.pad(narrow.positions, padding),
    narrow.task_ids,
  )


def documents_batch(*rows: tuple[int, ...]) -> Batch:
  """Rows of whole documents of these lengths: the same text, however it is laid in rows."""
  shape = (len(rows), tiny_config.LENGTH)
  # Padding holds a token of the text, 3, which must not count.
  tokens, targets = np.full(shape, 3, np.int32), np.full(shape, IGNORE, np.int32)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  next_token = 1
  for row, lengths in enumerate(rows):
    begin = 0
    for number, length in enumerate(lengths):
      places = slice(begin, begin + length)
      tokens[row, places] = np.arange(next_token, next_token + length)
      targets[row, places] = np.roll(tokens[row, places], -1)
      segments[row, places] = number + 1
      positions[row, places] = np.arange(length)
      begin += length
      next_token += length
  return make_batch(tokens, targets, segments, positions)
