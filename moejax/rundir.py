"""The directory of a run: who may write to it, which steps lie in it, and which of them stay.

Steps appear and vanish by a rename: whoever is killed leaves whole steps, and rubbish with a name that says so. Only
the writer, who holds the lock, takes it away: to others it may be a save in flight.
"""
import contextlib
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from moejax.config import ConfigError
from moejax.distributed import is_first
from moejax.faults import pass_by

log = logging.getLogger(__name__)
RUBBISH = ('*.orbax-checkpoint-tmp*', '*.deleted')


class RunInUse(RuntimeError):
  """Another process writes to the run directory."""


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the run directory until the block ends or the process dies, however it dies."""
  try:
    Path(workdir).mkdir(parents=True, exist_ok=True)
    number = os.open(Path(workdir) / 'lock', os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  except OSError as error:  # ELOOP: it is a link, and what it leads to would be written over
    raise ConfigError(f'workdir={workdir}: {error}; name a directory that can be written to') from error
  with open(number, 'r+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise RunInUse(f'workdir={workdir} is in use by process {file.read().strip()}; stop it or name another') from None
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
    self.directory, self._parts = Path(directory).absolute(), parts
    self._foreign: set[Path] = set()

  def path(self, step: int) -> Path:
    return self.directory / f'{step}'

  def all(self) -> list[int]:
    """Those on disk, oldest first, good or bad; never the one being saved. Warns once of what is not ours."""
    numbers = [p for p in self.directory.glob('[0-9]*') if p.name.isdecimal() and p.name == str(int(p.name))]
    foreign = {p for p in numbers if p.is_symlink() or not any((p / part).exists() for part in self._parts)}
    for path in sorted(p for p in foreign - self._foreign if os.path.lexists(p)):  # not deleted just now
      log.warning('%s is not a checkpoint: ignored', path)
    self._foreign |= foreign
    return sorted(int(p.name) for p in numbers if p not in foreign)

  def delete(self, step: int) -> None:
    if is_first():
      gone = self.path(step).rename(self.directory / f'{step}.deleted')
      pass_by('delete')
      shutil.rmtree(gone, ignore_errors=True)  # what stays has the name of rubbish

  def clean(self) -> None:
    """Takes away what killed and failed saves and deletions left; not while a save is in flight."""
    for path in (p for pattern in RUBBISH for p in self.directory.glob(pattern) if is_first()):
      shutil.rmtree(path, ignore_errors=True)  # a failed save may still write there; the next one cleans again
