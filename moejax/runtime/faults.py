"""Faults on purpose, to see a run survive them: MOEJAX_FAULT='kill@save:3' kills the process at its third save.

ACTION@POINT:N, several with commas between. At `step`, `loss`, `gradient` and `validation` N is a step of the run; at
the others it is how often this process has come by. Unset, it costs nothing: the programs are the same ones.
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

from moejax.config import check

T = TypeVar('T')
_passed: Counter[str] = Counter()
VARIABLE = 'MOEJAX_FAULT'
POINTS = {
  'step': 'before a step of the run is begun',
  'save': 'when a save has begun, and is in flight',
  'commit': 'when all of a save is written, and it does not have its name yet',
  'delete': 'when an old step has its new name, and is not yet deleted',
  'log': 'before a piece of metrics.jsonl, load.jsonl or of TensorBoard is written',
}
NUMBERS = {
  'loss': 'of a training step',
  'gradient': 'of a training step',
  'validation': 'the losses it sums up',
}


def _full() -> None:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {  # at POINTS
  'kill': lambda: os.kill(os.getpid(), signal.SIGKILL),
  'term': lambda: os.kill(os.getpid(), signal.SIGTERM),
  'hang': lambda: time.sleep(3600),
  'full': _full,
}
SPOILS: dict[str, Callable[[Array], Array]] = {  # to NUMBERS
  'nan': lambda x: x + jnp.nan,
  'inf': lambda x: x + jnp.inf,
  'spike': lambda x: 1000 * x,
}


def planned(text: str) -> dict[tuple[str, int], str]:
  """(point, N) -> action of a MOEJAX_FAULT; ConfigError where that says nothing."""
  found = {}
  for part in filter(None, text.split(',')):
    match = re.fullmatch(r'(\w+)@(\w+):(\d+)', part)
    fits = match and (
      (match[1] in ACTIONS and match[2] in POINTS) or (match[1] in SPOILS and match[2] in NUMBERS)
    )
    check(
      ''
      if fits
      else f'{VARIABLE}={part!r}: give ACTION@POINT:N, such as kill@save:3, of {sorted(ACTIONS)} at {sorted(POINTS)} or '
      f'of {sorted(SPOILS)} at {sorted(NUMBERS)}'
    )
    found[match[2], int(match[3])] = match[1]
  return found


@functools.cache
def parse_environment() -> dict[tuple[str, int], str]:
  """What the environment asks for, read once. Raises ConfigError."""
  return planned(os.environ.get(VARIABLE, ''))


def fault_point(point: str, step: int = 0) -> None:
  """Does what is planned here; at the point `step` the step of the run is to be given."""
  if not parse_environment():
    return
  _passed[point] += 1
  if action := parse_environment().get((point, step or _passed[point])):
    ACTIONS[action]()


def inject(point: str, numbers: T, step: Array | int) -> T:
  """The numbers as they are, or as they are planned to be at that step; inside jit, decided when it is traced."""
  for (where, n), action in parse_environment().items():
    if where == point:
      hit = jnp.asarray(step) == n
      numbers = jax.tree.map(
        lambda x, spoil=SPOILS[action], hit=hit: jnp.where(hit, spoil(x), x), numbers
      )
  return numbers
