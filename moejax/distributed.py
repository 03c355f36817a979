"""Many processes as one: who is the first, and what all of them must decide alike."""

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
  """Whether this process is the one that writes logs; alone, it is."""
  return jax.process_index() == 0


def agreed(number: int) -> int:
  """The first process's number, in all of them. Every process must call it, in the same order as other collectives."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(number))
