"""Faults on purpose, to test that a run survives them.

MOEJAX_FAULT='kill@save:3' kills the process at its third save. The form is ACTION@POINT:N, several
with commas between. At `step`, `loss`, `gradient` and `validation` N is a step of the run; at the
other points it is how often this process has passed. Unset, it costs nothing: the compiled programs
are the same ones.
"""

import errno
import functools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import ConfigError

T = TypeVar('T')
VARIABLE = 'MOEJAX_FAULT'
_passed: Counter[str] = Counter()  # point -> how often this process has passed it
# Where a process can be hit.
POINTS = {
  'step': 'before a step of the run is begun',
  'save': 'when a save has begun, and is in flight',
  'commit': 'when all of a save is written, and it does not have its name yet',
  'delete': 'when an old step has its new name, and is not yet deleted',
  'log': 'before a piece of metrics.jsonl, load.jsonl or of TensorBoard is written',
}
# What can be spoilt inside a compiled program.
NUMBERS = {
  'loss': 'of a training step',
  'gradient': 'of a training step',
  'validation': 'the losses it sums up',
}


def _disk_full() -> None:
  """Raises what a write to a full disk raises."""
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {  # at POINTS
  'kill': lambda: os.kill(os.getpid(), signal.SIGKILL),
  'term': lambda: os.kill(os.getpid(), signal.SIGTERM),
  'hang': lambda: time.sleep(3600),
  'full': _disk_full,
}
SPOILS: dict[str, Callable[[Array], Array]] = {  # to NUMBERS
  'nan': lambda x: x + jnp.nan,
  'inf': lambda x: x + jnp.inf,
  'spike': lambda x: 1000 * x,
}


def parse_faults(text: str) -> dict[tuple[str, int], str]:
  """Returns (point, N) -> action for a value of MOEJAX_FAULT, {} for ''.

  Raises:
    ConfigError: a part is not of the form, or its action and point do not go together.
  """
  actions = {}
  for part in filter(None, text.split(',')):
    match = re.fullmatch(r'(\w+)@(\w+):(\d+)', part)
    if match is None or not _go_together(match[1], match[2]):
      raise ConfigError(
        f'{VARIABLE}={part!r}: give ACTION@POINT:N, such as kill@save:3, of {sorted(ACTIONS)} at '
        f'{sorted(POINTS)} or of {sorted(SPOILS)} at {sorted(NUMBERS)}'
      )
    actions[match[2], int(match[3])] = match[1]
  return actions


def _go_together(action: str, point: str) -> bool:
  """Tells whether there is such an action at such a point."""
  is_action = action in ACTIONS and point in POINTS
  is_spoil = action in SPOILS and point in NUMBERS
  return is_action or is_spoil


@functools.cache
def parse_environment() -> dict[tuple[str, int], str]:
  """Returns what the environment asks for, see `planned`; it is read once in a process.

  Raises:
    ConfigError: it asks for a fault that there is not.
  """
  return parse_faults(os.environ.get(VARIABLE, ''))


def fault_point(point: str, step: int = 0) -> None:
  """Does what the environment plans for this passage of the point, which is a key of POINTS.

  Args:
    point: where the process is.
    step: of the run, at the point 'step'; elsewhere 0, and the passages are counted instead.
  """
  if not parse_environment():
    return
  _passed[point] += 1
  number = step or _passed[point]
  action = parse_environment().get((point, number))
  if action:
    ACTIONS[action]()


def inject(point: str, numbers: T, step: Array | int) -> T:
  """Returns the numbers as they are, spoilt at the steps that the environment plans for the point.

  Whether there is such a step is decided when a jitted function is traced: without a fault nothing
  is added to the program.

  Args:
    point: a key of NUMBERS.
    numbers: a tree of arrays.
    step: of the run, which may be traced.
  """
  for (planned_point, planned_step), action in parse_environment().items():
    if planned_point == point:
      numbers = _spoil_if(jnp.asarray(step) == planned_step, SPOILS[action], numbers)
  return numbers


def _spoil_if(hit: Array, spoil: Callable[[Array], Array], numbers: T) -> T:
  """Returns a tree of arrays, spoilt where `hit`, a scalar, is true."""
  return jax.tree.map(lambda x: jnp.where(hit, spoil(x), x), numbers)
