"""Log files that only grow, by whole pieces.

Where there is no room for a piece it is lost, and the run goes on.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

from moejax.runtime.faults import fault_point

log = logging.getLogger(__name__)
_failing: set[pathlib.Path] = set()  # logs that could not be written the last time


@contextlib.contextmanager
def warn_once(path: pathlib.Path) -> Iterator[None]:
  """Turns an OSError in the block, which writes the log at `path`, into a warning.

  A full disk fails all logs at each step: there is one warning for all of them until every one of
  them has been written again, and then one more.
  """
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
  """A file to which pieces are appended. A piece is in it whole or not at all."""

  def __init__(self, path: str | os.PathLike) -> None:
    self._path = pathlib.Path(path)
    self._file = open(path, 'ab', buffering=0)  # each write is a system call of its own

  def write(self, piece: bytes) -> bool:
    """Appends a piece, and tells whether there was room for it.

    When it returns True the piece has left the process: killing the process does not undo it.
    """
    size = self._file.seek(0, os.SEEK_END)
    left = piece
    with warn_once(self._path):
      try:
        fault_point('log')
        while left:  # a raw write may take a part only
          left = left[self._file.write(left) :]
      except OSError:
        with contextlib.suppress(OSError):
          self._file.truncate(size)  # takes the part of a piece back; it needs no room
        raise
    return not left

  def close(self) -> None:
    """Closes the file; nothing is left to be written."""
    self._file.close()
