"""Many processes as one: which is the first, and what all of them must decide alike.

Every function that asks the other processes is to be called by all of them, in the same order: each
waits for the rest. A process alone asks none.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ConfigError
from moejax.runtime.files import partial_of, staged

T = TypeVar('T')
log = logging.getLogger(__name__)

SUCCESS = 0  # the code of a process whose block of fail_together ended well


def is_first_process() -> bool:
  """Tells whether this process is the one that writes files and logs; alone, it is."""
  return jax.process_index() == 0


def of_this_process(work: Iterable[T]) -> list[T]:
  """Returns this process's share of what all processes do together; alone, it does all."""
  return [*work][jax.process_index() :: jax.process_count()]


def broadcast_from_first(number: int) -> int:
  """Returns the number that the first process gives, in all of them. It must fit in an i32."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_ints(number: int) -> list[int]:
  """Returns the numbers of all processes, in the order of processes. They must fit in an i32."""
  if jax.process_count() == 1:
    return [number]
  return np.ravel(multihost_utils.process_allgather(np.int32(number))).tolist()


def sum_over_processes(numbers: np.ndarray) -> np.ndarray:
  """Returns the sums of what all processes give, u32, mod 2^32; their shapes are alike."""
  if jax.process_count() == 1:
    return numbers
  return multihost_utils.process_allgather(numbers).sum(0, dtype=np.uint32)


def check_alike(what: str, text: str) -> None:
  """Raises ConfigError in all processes where one of them has another text than the first.

  Args:
    what: what the text is, for the message.
    text: of this process.
  """
  # 28 bits of the digest, which fit in the i32 that is gathered.
  digests = gather_ints(int(hashlib.sha256(text.encode()).hexdigest()[:7], 16))
  others = [process for process, digest in enumerate(digests) if digest != digests[0]]
  if others:
    raise ConfigError(f'{what} of process {others[0]} is not that of process 0: give all the same')


@contextlib.contextmanager
def fail_together(*kinds: type[Exception]) -> Iterator[None]:
  """Raises an error of these kinds in all processes, where the block raised it in one of them.

  What one process cannot do, none does. At the end of the block all processes are asked; within it
  no process may ask the others: a process that has failed would not answer.

  Args:
    *kinds: kinds of errors. Each can be made of a message alone.
  """
  error = None
  try:
    yield
  except kinds as caught:
    error = caught
  # An exception cannot be sent, a number can.
  codes = gather_ints(_failure_code(error, kinds))
  if error is not None:
    if codes[0] == SUCCESS:
      # Only the first process prints what it raises, and it does not have this error's text.
      log.error('process %d: %s', jax.process_index(), error)
    raise error
  code = max(codes)
  if code != SUCCESS:
    kind = kinds[code - 1]
    raise kind(f'process {codes.index(code)} failed with {kind.__name__}; see its log')


def _failure_code(error: Exception | None, kinds: Sequence[type[Exception]]) -> int:
  """Returns SUCCESS, or the place of the first kind that the error is of, counted from 1."""
  for code, kind in enumerate(kinds, 1):
    if isinstance(error, kind):
      return code
  return SUCCESS


@contextlib.contextmanager
def staged_together(target: Path) -> Iterator[Path]:
  """Yields the same directory in all processes, for them to fill: `staged`, for one or many.

  All of them see one file system. What one raises in the block, all must raise.

  Raises:
    ConfigError: the target holds something, or another command is making it.
  """
  with contextlib.ExitStack() as held:
    with fail_together(ConfigError, OSError):
      if is_first_process():
        held.enter_context(staged(target))
    yield partial_of(target)
    with fail_together(ConfigError, OSError):
      held.close()  # renames; nobody goes on before


class Vote:
  """The signal at which to stop, the same in all processes before the same step.

  The processes do not wait for each other to tell. What each has received is compared on the
  devices, beside the step, and the result is read a step later, when it is there.
  """

  def __init__(self, received: Sequence[int], mesh: Mesh) -> None:
    """Prepares the comparison.

    Args:
      received: the signals that this process has received, which may grow.
      mesh: of the run, on whose devices the processes are compared.
    """
    self._received = received
    self._alone = jax.process_count() == 1
    # A vote for each device, which is that of its process.
    self._one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._pending: list[jax.Array] = []  # results that are not read yet, at most two

  def cast(self) -> int:
    """Casts this process's vote, and returns the signal as of the call before this one; 0: none.

    A process alone gets its signal as of now.
    """
    mine = self._received[0] if self._received else 0
    if self._alone:
      return mine
    votes = np.full(len(self._one_each.addressable_devices), mine, np.int32)
    all_votes = jax.make_array_from_process_local_data(self._one_each, votes)
    self._pending.append(self._max(all_votes))
    if len(self._pending) < 2:
      return 0
    # Reading the newest result would wait for the step that the devices are at.
    return int(self._pending.pop(0))
