"""Files and directories that are whole under their names or not there; files that are not trusted.

Whatever is written for another process to read is made under a temporary name, synchronised to the
disk and then renamed. A process that is killed while it writes leaves no half of a file under the
name that others read.
"""

import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moejax.config import ConfigError

DAMAGED = 'the file is damaged or cut short: fetch or export it again'
STALE_SECONDS = 3600  # the age of a temporary file at which its writer counts as dead
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
FETCH_AGAIN = 'fetch or export the directory again'


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`, at which the block makes a file.

  When the block ends well the file takes the place of `path`; when it raises, the file is removed.
  Readers see what was there before, or all of what is new. A link at `path` is replaced and not
  followed. What writers of this path left that were killed long ago is removed.
  """
  _remove_stale_temporaries(path)
  # A name of its own, so that two processes that write the same path do each other no harm.
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    # A rename may reach the disk before the bytes do, unless these are sent first.
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _remove_stale_temporaries(path: Path) -> None:
  for temporary in path.parent.glob(f'{glob.escape(path.name)}.*.tmp'):
    with contextlib.suppress(FileNotFoundError):  # another writer may have removed it
      if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
        temporary.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedWriter]:
  """Yields a new binary file, which takes the place of `path` when the block ends well.

  See `whole_path`.
  """
  with whole_path(path) as temporary, open(temporary, 'xb') as file:
    yield file
    file.flush()  # into the kernel, from where whole_path syncs it


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes a file of this content, text as UTF-8, or leaves what was there; see `whole_path`."""
  with whole_file(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)


def is_disk_error(error: Exception) -> bool:
  """Tells whether an error is of the disk: full, over its quota, read-only, or failing."""
  return isinstance(error, OSError) and error.errno in DISK_ERRORS


def expect_room(target: Path) -> None:
  """Raises ConfigError where the directory holds something; to be called before long work."""
  is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
  if not is_free:
    raise ConfigError(f'{target} is there and not empty; name another directory, or move it away')


def partial_of(target: Path) -> Path:
  """Returns the directory in which `staged` makes the target."""
  return target.with_name(f'{target.name}.moejax-partial')


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
  """Yields an empty directory beside the target, for the block to fill.

  When the block ends well the directory becomes the target; when it raises, it is removed.

  Raises:
    ConfigError: the target holds something, or another process is making it.
  """
  expect_room(target)
  partial = partial_of(target)
  partial.mkdir(parents=True, exist_ok=True)
  # The kernel releases the lock when the process ends, however it dies.
  lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      busy = f'{target} is being written by another process; wait for it, or name another'
      raise ConfigError(busy) from None
    try:
      _clear(partial)
      yield partial
      os.fsync(lock)
      partial.rename(target)
    except BaseException:  # also a KeyboardInterrupt
      shutil.rmtree(partial, ignore_errors=True)
      raise
  finally:
    os.close(lock)
  # The rename is an entry of the parent directory, which reaches the disk by a sync of its own.
  parent = os.open(target.parent, os.O_RDONLY)
  os.fsync(parent)
  os.close(parent)


def _clear(directory: Path) -> None:
  """Removes what a process that was killed left in the directory; links are not followed."""
  for stale in directory.iterdir():
    if stale.is_dir() and not stale.is_symlink():
      shutil.rmtree(stale)
    else:
      stale.unlink()


def inside(directory: Path, name: str) -> Path:
  """Returns the path of a file in the directory; `name` may be untrusted, as one read from a file.

  Raises:
    ConfigError: it leads out of the directory, and not to the blobs of a cache of snapshots.
  """
  root = directory.resolve()
  allowed_roots = [root]
  # The files of a snapshot in a Hugging Face cache are links to blobs/ two levels up.
  if root.parent.name == 'snapshots':
    allowed_roots.append(root.parents[1] / 'blobs')
  try:
    target = (root / name).resolve()
  except RuntimeError as error:  # links in a circle
    problem = f'{name!r:.200} ({error})'
    raise bad_file(directory, 'the name of a file in it', problem, FETCH_AGAIN) from error
  if not any(target.is_relative_to(allowed) for allowed in allowed_roots):
    problem = f'{name!r:.200}, which is {target}'
    raise bad_file(directory, 'files inside it only', problem, 'copy the file there')
  return directory / name


def read_json(directory: Path, name: str) -> dict[str, object]:
  """Returns the JSON object in a file of the directory, {} where there is no such file.

  Raises:
    ConfigError: the file holds another thing, or is not inside the directory.
  """
  path = inside(directory, name)
  if not path.is_file():
    return {}
  return parse_json_object(path, path.read_bytes())


def parse_json_object(path: Path, raw: bytes) -> dict[str, object]:
  """Returns the JSON object in the bytes of the file at `path`, which is named in errors only.

  Raises:
    ConfigError: it is no JSON object; or an object in it has a name twice, of which the parser
      would silently take the last, or a name that would garble a terminal or a log.
  """

  def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(name for name, _ in pairs)
    for name, count in counts.items():
      if count > 1:
        raise bad_file(path, 'every name once', f'duplicated {name!r}')
    for name in counts:
      if not name.isprintable():
        raise bad_file(path, 'names that can be printed', repr(name))
    return dict(pairs)

  try:
    content = json.loads(raw.decode(), object_pairs_hook=unique)
  except ConfigError:  # from `unique`; it is a ValueError too
    raise
  except (ValueError, RecursionError) as error:
    raise bad_file(path, 'JSON', f'{type(error).__name__}: {error}') from error
  if not isinstance(content, dict):
    raise bad_file(path, 'a JSON object', type(content).__name__)
  return content


def bad_file(path: Path, expected: object, found: object, remedy: str = DAMAGED) -> ConfigError:
  """Returns the error for a file that cannot be read as it is.

  Args:
    path: the file, or the directory that it is in.
    expected: what should be in it.
    found: what is in it.
    remedy: what a person can do.
  """
  return ConfigError(f'{path}: expected {expected}, found {found}; {remedy}')
