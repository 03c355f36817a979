"""A batch of token rows: the one record that the data pipeline makes and that models and losses read.

Letters: B batch, S sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

IGNORE = -100  # the target of a position that has nothing to predict


class Batch(NamedTuple):
  """[B, S] arrays: NumPy as they leave the pipeline, JAX inside a step."""

  tokens: Array  # i32
  targets: Array  # i32, IGNORE where there is nothing to predict
  mask: Array  # bool: targets != IGNORE, what the LM loss counts
  segment_ids: Array  # i32, 1.. = documents of the row in order, 0 = padding
  positions: Array  # i32, from 0 in each document and in a row that starts inside one
  task_ids: Array  # [B] i32: the row is of Data.tasks[i]


def make_batch(
  tokens: Array,
  targets: Array | None = None,
  segment_ids: Array | None = None,
  positions: Array | None = None,
  task_ids: Array | None = None,
) -> Batch:
  """A Batch of token ids [B, S], of NumPy arrays or of JAX arrays as the ids are.

  Args:
    tokens: ids, those of padding included.
    targets: what follows each token, IGNORE where nothing is to be predicted; None: nowhere.
    segment_ids: document of each token, 0 for padding; None: each row is one document.
    positions: of each token in its document; None: counted from 0 in each, 0 for padding.
    task_ids: [B]; None: all rows are of the first task.
  """
  xp = jnp if isinstance(tokens, jax.Array) else np
  if targets is None:
    targets = xp.full(tokens.shape, IGNORE)
  if segment_ids is None:
    segment_ids = xp.ones(tokens.shape)
  if positions is None:
    positions = positions_in(segment_ids)
  if task_ids is None:
    task_ids = xp.zeros(tokens.shape[0])
  return Batch(
    tokens=tokens.astype(np.int32),
    targets=targets.astype(np.int32),
    mask=targets != IGNORE,
    segment_ids=segment_ids.astype(np.int32),
    positions=positions.astype(np.int32),
    task_ids=task_ids.astype(np.int32),
  )


def positions_in(segment_ids: Array) -> Array:
  """The place of each token in its document, from 0; 0 for padding. [B, S] -> [B, S] i32."""
  xp = jnp if isinstance(segment_ids, jax.Array) else np
  index = xp.arange(segment_ids.shape[1], dtype=np.int32)
  before = xp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=0)
  # The place in the row where the token's document opens: the last opening so far.
  opened_at = xp.where(segment_ids != before, index, 0)
  if xp is jnp:
    opened_at = jax.lax.cummax(opened_at, axis=1)
  else:
    opened_at = np.maximum.accumulate(opened_at, axis=1)
  return xp.where(segment_ids > 0, index - opened_at, 0)
