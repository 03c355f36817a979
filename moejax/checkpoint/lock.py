"""The lock on a run directory: one process writes to it at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from moejax.config import ConfigError


class RunInUse(RuntimeError):
  """Another process writes to the run directory."""


@contextlib.contextmanager
def hold_run_directory(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the run directory until the block ends or the process dies, however it dies.

  Raises:
    RunInUse: another process holds it.
    ConfigError: it cannot be made or written to.
  """
  try:
    Path(workdir).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(workdir) / 'lock', os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  except OSError as error:  # ELOOP: it is a link, and what it leads to would be written over
    if error.errno == errno.ENOSPC:
      raise  # another name would not help
    raise ConfigError(
      f'workdir={workdir}: {error}; name a directory that can be written to'
    ) from error
  with open(descriptor, 'r+') as file:
    try:
      # The kernel releases the lock with the process: the file itself may stay.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise RunInUse(
        f'workdir={workdir} is in use by process {file.read().strip()}; stop it or name another'
      ) from None
    file.truncate(0)  # the number of the process before
    print(os.getpid(), file=file, flush=True)
    yield
