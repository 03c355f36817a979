"""The directory of a run: who may write to it, which steps lie in it, and which of them stay.

Steps appear and vanish by a rename, so that a process killed at any time leaves whole steps, and rubbish with
a name that says so. Only the writer, who holds the lock, takes it away: to others it may be a save in flight.
"""
import contextlib
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from moejax.faults import pass_by

log = logging.getLogger(__name__)
RUBBISH = ('*.orbax-checkpoint-tmp*', '*.deleted')


class RunInUse(RuntimeError):
  """Another process writes to the run directory."""


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the run directory until the block ends or the process dies, however it dies."""
  Path(workdir).mkdir(parents=True, exist_ok=True)
  with open(Path(workdir) / 'lock', 'a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      pid = file.read().strip()
      raise RunInUse(f'workdir={workdir} is in use by process {pid}; stop it or name another') from None
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    yield


def kept(metrics: Mapping[int, float], latest: int, every: int, best: bool) -> set[int]:
  """Which of step -> metric stay: latest, every k-th, the best (the lowest; never one that is not finite)."""
  finite = {step: metric for step, metric in metrics.items() if math.isfinite(metric)}
  chosen = [min(finite, key=lambda step: (finite[step], -step))] if finite and best else []
  return {*sorted(metrics)[-latest:], *chosen, *(step for step in metrics if every and step % every == 0)}


class Steps:
  """The step directories in a directory: DIR/step holds all of `parts`, or the step is damaged."""

  def __init__(self, directory: str | os.PathLike, parts: tuple[str, ...]) -> None:
    self.directory = Path(directory).absolute()
    self._parts = parts
    self._foreign: set[Path] = set()

  def path(self, step: int) -> Path:
    return self.directory / str(step)

  def all(self) -> list[int]:
    """Those on disk, oldest first, good or bad; never the one being saved. Warns once of what is not ours."""
    numbers = [p for p in self.directory.glob('[0-9]*') if p.name.isdecimal() and p.name == str(int(p.name))]
    foreign = {p for p in numbers if p.is_symlink() or not any((p / part).exists() for part in self._parts)}
    for path in sorted(foreign - self._foreign):
      log.warning('%s is not a checkpoint: ignored', path)
    self._foreign |= foreign
    return sorted(int(p.name) for p in numbers if p not in foreign)

  def delete(self, step: int) -> None:
    if jax.process_index() == 0:
      gone = self.path(step).rename(self.directory / f'{step}.deleted')
      pass_by('delete')
      shutil.rmtree(gone)

  def clean(self) -> None:
    """Takes away what killed and failed saves and deletions left; not while a save is in flight."""
    for path in (p for pattern in RUBBISH for p in self.directory.glob(pattern) if jax.process_index() == 0):
      shutil.rmtree(path)
