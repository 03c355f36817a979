"""The steps in a directory of checkpoints: which there are, and which of them are kept.

Steps appear and vanish by a rename: a process that is killed leaves whole steps, and rubbish with a
name that says so. Only the writer, who holds the lock, takes rubbish away: to others it may be a
save in flight.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from moejax.runtime.faults import fault_point
from moejax.runtime.multiprocess import is_first_process

log = logging.getLogger(__name__)
RUBBISH = ('*.orbax-checkpoint-tmp*', '*.deleted')  # saves and deletions that were cut short


def steps_to_keep(metrics: Mapping[int, float], latest: int, every: int, best: bool) -> set[int]:
  """Returns which steps are kept.

  Args:
    metrics: step -> metric of all steps; lower is better.
    latest: how many of the newest are kept, 1 or more.
    every: all steps divisible by this are kept; 0: none.
    best: whether the step of the lowest metric is kept, of equals the newest. One that is not
      finite is never the best.
  """
  keep = set(sorted(metrics)[-latest:])
  if every:
    keep.update(step for step in metrics if step % every == 0)
  finite = {step: metric for step, metric in metrics.items() if math.isfinite(metric)}
  if best and finite:
    keep.add(min(finite, key=lambda step: (finite[step], -step)))
  return keep


class Steps:
  """The step directories in a directory: DIR/step holds all of `parts`, or the step is damaged."""

  def __init__(self, directory: str | os.PathLike, parts: tuple[str, ...]) -> None:
    """Looks at nothing yet: the directory need not exist."""
    self.directory = Path(directory).absolute()
    self._parts = parts
    self._foreign: set[Path] = set()  # what was warned of

  def path(self, step: int) -> Path:
    """Returns the directory of a step."""
    return self.directory / f'{step}'

  def unnamed(self, step: int) -> list[Path]:
    """Returns the directories of a save in flight, which has no name of a step yet."""
    return [*self.directory.glob(f'{step}.orbax-checkpoint-tmp*')]

  def all(self) -> list[int]:
    """Returns the steps on the disk, oldest first, good or bad; never the one being saved.

    Warns once of each directory with the name of a step that holds none.
    """
    numbered = [path for path in self.directory.glob('[0-9]*') if _is_name_of_step(path.name)]
    foreign = {path for path in numbered if self._is_foreign(path)}
    for path in sorted(foreign - self._foreign):
      if os.path.lexists(path):  # else it was deleted just now, and looked empty for that
        log.warning('%s is not a checkpoint: ignored', path)
    self._foreign |= foreign
    return sorted(int(path.name) for path in numbered if path not in foreign)

  def _is_foreign(self, path: Path) -> bool:
    """Tells whether a directory is a link, or has no part of a step."""
    return path.is_symlink() or not any((path / part).exists() for part in self._parts)

  def delete(self, step: int) -> None:
    """Deletes a step; the first process does it for all."""
    if is_first_process():
      # First a name that says so: whoever is killed in the act leaves no half of a step.
      deleted = self.path(step).rename(self.directory / f'{step}.deleted')
      fault_point('delete')
      shutil.rmtree(deleted, ignore_errors=True)  # what cannot be removed has the name of rubbish

  def clean(self) -> None:
    """Removes what killed and failed saves and deletions left; not while a save is in flight."""
    if not is_first_process():
      return
    for pattern in RUBBISH:
      for path in self.directory.glob(pattern):
        # A save that failed may still write there: errors are ignored, the next save cleans again.
        shutil.rmtree(path, ignore_errors=True)


def _is_name_of_step(name: str) -> bool:
  """Tells whether a name is a number as Steps.path writes it: '7', and not '007'."""
  return name.isdecimal() and name == str(int(name))
