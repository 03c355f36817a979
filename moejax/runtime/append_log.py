"""Files of a log: they only grow, by whole pieces. Where they cannot, lines are lost, and the run goes on."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

from moejax.runtime.faults import fault_point

log = logging.getLogger(__name__)
_failing: set[pathlib.Path] = set()


@contextlib.contextmanager
def warn_once(path: pathlib.Path) -> Iterator[None]:
  """Around what writes a log: an OSError is no more than a warning, one for all logs until each is written again."""
  try:
    yield
  except OSError as error:
    if not _failing:
      log.warning(
        '%s: %s: training goes on, and what is not logged now is lost', path, error.strerror
      )
    _failing.add(path)
  else:
    if path in _failing:
      _failing.remove(path)
      if not _failing:
        log.warning('%s: there is room again, logs are written', path)


class AppendLog:
  """A file to which pieces are added. A piece is in it whole or not at all."""

  def __init__(self, path: str | os.PathLike) -> None:
    self._path, self._file = pathlib.Path(path), open(path, 'ab', buffering=0)

  def write(self, piece: bytes) -> bool:
    """When it returns the piece has left the process: no kill takes it back. Returns whether there was room for it."""
    size, left = self._file.seek(0, os.SEEK_END), piece
    with warn_once(self._path):
      try:
        fault_point('log')
        while left:
          left = left[self._file.write(left) :]
      except OSError:
        with contextlib.suppress(OSError):
          self._file.truncate(size)  # needs no room
        raise
    return not left

  def close(self) -> None:
    """Nothing is left to be written."""
    self._file.close()
