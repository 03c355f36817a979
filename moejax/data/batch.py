"""A batch of token rows: the one record that the data pipeline makes and that models and losses read.

Letters: B batch, S sequence.
"""

from typing import NamedTuple

import jax
import numpy as np

IGNORE = -100                # the target of a position that has nothing to predict
Array = jax.Array | np.ndarray


class Batch(NamedTuple):
  """[B, S] arrays: NumPy as they leave here, JAX inside a step."""
  tokens: Array            # i32
  targets: Array           # i32, IGNORE where there is nothing to predict
  mask: Array              # bool: targets != IGNORE, what the LM loss counts
  segment_ids: Array       # i32, 1.. = documents of the row in order, 0 = padding
  positions: Array         # i32, from 0 in each document and in a row that starts inside one
  task_ids: Array          # [B] i32: the row is of Data.tasks[i]
