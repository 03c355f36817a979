"""Many processes as one: who is the first, and what all of them must decide alike.

Every function that asks the other processes is to be called by all of them, in the same order.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import check

Tree = TypeVar('Tree')
log = logging.getLogger(__name__)


def is_first_process() -> bool:
  """Whether this process is the one that writes logs; alone, it is."""
  return jax.process_index() == 0


def broadcast_from_first(number: int) -> int:
  """The first process's number, in all of them."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_ints(number: int) -> list[int]:
  """Each process's number, in all of them."""
  return (
    np.ravel(multihost_utils.process_allgather(np.int32(number))).tolist()
    if jax.process_count() > 1
    else [number]
  )


def true_everywhere(here: bool) -> bool:
  """Whether it holds in all processes: what one of them alone could not read or write, none takes for good."""
  return all(gather_ints(int(here)))


def check_alike(what: str, text: str) -> None:
  """ConfigError in all processes where one has another text than the first."""
  digests = gather_ints(int(hashlib.sha256(text.encode()).hexdigest()[:7], 16))
  others = [i for i, digest in enumerate(digests) if digest != digests[0]]
  check(
    f'{what} of process {others[0]} is not that of process 0: give all the same' if others else ''
  )


@contextlib.contextmanager
def fail_together(*kinds: type[Exception]) -> Iterator[None]:
  """What one process cannot do, none does: an error of these kinds in one of them is raised in all, at the end of the
  block, in which nobody may ask the others."""
  error = None
  try:
    yield
  except kinds as caught:
    error = caught
  numbers = gather_ints(next((i for i, kind in enumerate(kinds, 1) if isinstance(error, kind)), 0))
  if error and not numbers[0]:
    log.error(
      'process %d: %s', jax.process_index(), error
    )  # the first, which speaks for all, does not know it
  if error:
    raise error
  if number := max(numbers):
    raise kinds[number - 1](f'in process {numbers.index(number)}, which says why')


class Vote:
  """The signal at which to stop, in all processes before the same step. They do not wait for each other to tell: what
  each has received is compared on the devices, beside the step, and read a step later."""

  def __init__(self, received: Sequence[int], mesh: Mesh) -> None:
    self._received, self._alone = received, jax.process_count() == 1
    self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._asked: list[jax.Array] = []

  def cast(self) -> int:
    """The signal as of the call before this one, 0: none. Alone: as of now."""
    mine = self._received[0] if self._received else 0
    if self._alone:
      return mine
    votes = np.full(len(self._where.addressable_devices), mine, np.int32)
    self._asked.append(self._most(jax.make_array_from_process_local_data(self._where, votes)))
    return int(self._asked.pop(0)) if len(self._asked) > 1 else 0
