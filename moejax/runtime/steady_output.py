"""What a run prints is never what ends it: stdout and stderr that may be closed, full or narrow."""

import contextlib
import errno
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TextIO

from moejax.runtime.append_log import warn_once

log = logging.getLogger(__name__)
NOBODY_READS = (errno.EPIPE, errno.EIO)  # a pipe or a terminal whose other end is closed


class SteadyStream:
  """A text stream whose writes raise no OSError: what cannot be written is lost.

  A stream that nobody reads is given up; a full disk is tried again at each write.
  """

  def __init__(self, stream: TextIO, name: str) -> None:
    """Wraps an open stream; `name` is what a warning calls it, '' for no warning."""
    self._stream, self._name, self._is_gone = stream, name, False

  def write(self, text: str) -> int:
    """Writes text; letters that the stream's encoding lacks become question marks."""
    if not text:  # it would pass for a write that found room
      return 0
    with self._told():
      try:
        self._stream.write(text)
      except UnicodeEncodeError:
        encoding = self._stream.encoding
        self._stream.write(text.encode(encoding, 'replace').decode(encoding))
      # Only now is it written: a buffer has room where the disk has none.
      self._stream.flush()
    return len(text)

  def flush(self) -> None:
    """Does nothing: `write` has sent all that can be sent."""

  def end(self) -> None:
    """Sends what is buffered, or drops it: left there, it would be an error of Python's exit."""
    try:
      self._stream.flush()
    except OSError:
      self._give_up()

  def __getattr__(self, name: str) -> object:
    return getattr(self._stream, name)  # isatty, fileno, encoding: as they are

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """Turns an OSError in the block into one warning for many."""
    with warn_once(pathlib.Path(self._name)) if self._name else contextlib.suppress(OSError):
      try:
        yield
      except OSError as error:
        if error.errno not in NOBODY_READS:
          raise
        if self._name and not self._is_gone:
          log.warning('%s is closed (%s): training goes on', self._name, error.strerror)
        self._give_up()

  def _give_up(self) -> None:
    """Sends all further text nowhere."""
    self._is_gone = True
    with contextlib.suppress(OSError, ValueError):  # not every stream has a descriptor
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
  """In the block, lets no `print` and no log line fail, whatever stdout and stderr are.

  That stdout cannot be written is told on stderr; that stderr cannot is told nowhere.
  """
  before: dict[str, TextIO] = {}
  for name, told_as in (('stdout', 'stdout'), ('stderr', '')):
    stream = getattr(sys, name)
    if stream is not None:  # Python's value for one that was closed; print then does nothing
      before[name] = stream
      setattr(sys, name, SteadyStream(stream, told_as))
  try:
    yield
  finally:
    for name, stream in before.items():
      getattr(sys, name).end()
      setattr(sys, name, stream)
