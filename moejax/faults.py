"""Faults on purpose, to see a run survive them: MOEJAX_FAULT='kill@save:3' kills the process at its third save.

ACTION@POINT:N, several with commas between. At the point `step` N is the step of the run; at the others it is how
often this process has come by. Unset, it costs nothing.
"""

from collections import Counter
import errno
import os
import re
import signal
import time

from moejax.config import check

VARIABLE = 'MOEJAX_FAULT'
POINTS = {
  'step': 'before a step of the run is begun',
  'save': 'when a save has begun, and is in flight',
  'delete': 'when an old step has its new name, and is not yet deleted',
  'log': 'before a line of metrics is written',
}


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _term() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


def _hang() -> None:
  time.sleep(3600)


def _full() -> None:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS = {'kill': _kill, 'term': _term, 'hang': _hang, 'full': _full}


def planned(text: str) -> dict[tuple[str, int], str]:
  """(point, N) -> action of a MOEJAX_FAULT; ConfigError where that says nothing."""
  found = {}
  for part in filter(None, text.split(',')):
    match = re.fullmatch(r'(\w+)@(\w+):(\d+)', part)
    check('' if match and match[1] in ACTIONS and match[2] in POINTS else
          f'{VARIABLE}={part!r}: give ACTION@POINT:N, such as kill@save:3, of {sorted(ACTIONS)} at {sorted(POINTS)}')
    found[match[2], int(match[3])] = match[1]
  return found


PLANNED = planned(os.environ.get(VARIABLE, ''))
_passed: Counter[str] = Counter()


def pass_by(point: str, step: int = 0) -> None:
  """Does what is planned here; at the point `step` the step of the run is to be given."""
  if not PLANNED:
    return
  _passed[point] += 1
  if action := PLANNED.get((point, step or _passed[point])):
    ACTIONS[action]()
