"""A batch of token rows: the record that the data pipeline makes and that models and losses read.

Letters: B batch, S sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

IGNORE = -100  # the target of a position that has nothing to predict


class Batch(NamedTuple):
  """Rows of tokens with all that a model and its losses must know of them.

  NumPy arrays as they leave the pipeline, JAX arrays inside a step.
  """

  tokens: Array  # [B, S] i32, those of padding included
  targets: Array  # [B, S] i32, what follows each token; IGNORE where there is nothing to predict
  mask: Array  # [B, S] bool, targets != IGNORE: what the language-model loss counts
  segment_ids: Array  # [B, S] i32, 1.. = documents of the row in order, 0 = padding
  positions: Array  # [B, S] i32, from 0 in each document, also where a row starts inside one
  task_ids: Array  # [B] i32, the row is of Data.tasks[i]


def make_batch(
  tokens: Array,
  targets: Array | None = None,
  segment_ids: Array | None = None,
  positions: Array | None = None,
  task_ids: Array | None = None,
) -> Batch:
  """Returns a Batch of token ids, with NumPy arrays or with JAX arrays, as the ids are.

  Args:
    tokens: [B, S] ids, those of padding included.
    targets: [B, S], what follows each token, IGNORE where nothing is to be predicted; None: IGNORE
      everywhere.
    segment_ids: [B, S], the document of each token, 0 for padding; None: each row is one document.
    positions: [B, S], of each token in its document; None: counted from 0 in each, 0 for padding.
    task_ids: [B]; None: all rows are of the first task.
  """
  # A NumPy batch must not touch a device: the pipeline runs beside the steps.
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
  """Returns the place of each token in its document, from 0; 0 for padding.

  Args:
    segment_ids: [B, S], the document of each token, 0 for padding.

  Returns:
    [B, S] i32.
  """
  xp = jnp if isinstance(segment_ids, jax.Array) else np
  columns = xp.arange(segment_ids.shape[1], dtype=np.int32)  # [S]
  previous = xp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=0)
  # The column where the token's document starts is the last start so far: a running maximum.
  starts = xp.where(segment_ids != previous, columns, 0)
  if xp is jnp:
    starts = jax.lax.cummax(starts, axis=1)
  else:
    starts = np.maximum.accumulate(starts, axis=1)
  return xp.where(segment_ids > 0, columns - starts, 0)
