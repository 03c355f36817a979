"""Many processes as one: who is the first, and what all of them must decide alike."""

import jax
from jax.experimental import multihost_utils
import numpy as np


def is_first() -> bool:
  """Whether this process is the one that writes logs; alone, it is."""
  return jax.process_index() == 0


def agreed(number: int) -> int:
  """The first process's number, in all of them. Every process must call it, in the same order as other collectives."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(number))


def everywhere(here: bool) -> bool:
  """Whether it holds in all processes: what one of them alone could not read or write, none takes for good."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.array(here)).all())
