"""The directory of a run: who may write to it, which steps lie in it, and which of them stay.

Steps appear and vanish by a rename: whoever is killed leaves whole steps, and rubbish with a name that says so. Only
the writer, who holds the lock, takes it away: to others it may be a save in flight.
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
RUBBISH = ('*.orbax-checkpoint-tmp*', '*.deleted')


def steps_to_keep(metrics: Mapping[int, float], latest: int, every: int, best: bool) -> set[int]:
  """Which of step -> metric stay: latest, every k-th, the best (the lowest; never one that is not finite)."""
  finite = {step: metric for step, metric in metrics.items() if math.isfinite(metric)}
  chosen = [min(finite, key=lambda step: (finite[step], -step))] if finite and best else []
  return {
    *sorted(metrics)[-latest:],
    *chosen,
    *(step for step in metrics if every and step % every == 0),
  }


class Steps:
  """The step directories in a directory: DIR/step holds all of `parts`, or the step is damaged."""

  def __init__(self, directory: str | os.PathLike, parts: tuple[str, ...]) -> None:
    self.directory, self._parts = Path(directory).absolute(), parts
    self._foreign: set[Path] = set()

  def path(self, step: int) -> Path:
    return self.directory / f'{step}'

  def all(self) -> list[int]:
    """Those on disk, oldest first, good or bad; never the one being saved. Warns once of what is not ours."""
    numbers = [
      p for p in self.directory.glob('[0-9]*') if p.name.isdecimal() and p.name == str(int(p.name))
    ]
    foreign = {
      p for p in numbers if p.is_symlink() or not any((p / part).exists() for part in self._parts)
    }
    for path in sorted(
      p for p in foreign - self._foreign if os.path.lexists(p)
    ):  # not deleted just now
      log.warning('%s is not a checkpoint: ignored', path)
    self._foreign |= foreign
    return sorted(int(p.name) for p in numbers if p not in foreign)

  def delete(self, step: int) -> None:
    if is_first_process():
      gone = self.path(step).rename(self.directory / f'{step}.deleted')
      fault_point('delete')
      shutil.rmtree(gone, ignore_errors=True)  # what stays has the name of rubbish

  def clean(self) -> None:
    """Takes away what killed and failed saves and deletions left; not while a save is in flight."""
    for path in (
      p for pattern in RUBBISH for p in self.directory.glob(pattern) if is_first_process()
    ):
      shutil.rmtree(
        path, ignore_errors=True
      )  # a failed save may still write there; the next one cleans again
