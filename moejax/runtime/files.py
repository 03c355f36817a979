"""Files and directories that are whole under their names, or not there; and files that are not trusted.

Whatever is written for somebody else to read is made under a temporary name, synchronised to the disk and renamed:
whoever is killed in the act leaves no half of it.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moejax.config import ConfigError

DAMAGED = 'the file is damaged or cut short: fetch or export it again'
FETCH_AGAIN = 'fetch or export the directory again'


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
  """A temporary path beside `path`, whose file takes its place when the block ends well and vanishes if not.

  A link at `path` is replaced and not followed. Readers see what was there before, or all of what is new.
  """
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    # A rename may reach the disk before the bytes do, unless these are sent first.
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedWriter]:
  """A new file to write to, which takes the place of `path` when the block ends well; see `whole_path`."""
  with whole_path(path) as temporary, open(temporary, 'xb') as file:
    yield file
    file.flush()


def write_whole(path: Path, content: str | bytes) -> None:
  """A file with this content, or what was there before."""
  with whole_file(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)


def expect_room(target: Path) -> None:
  """ConfigError where something is already: worth asking before long work."""
  is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
  if not is_free:
    raise ConfigError(f'{target} is there and not empty; name another directory, or move it away')


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
  """An empty directory beside the target, which becomes the target when the block ends well, and vanishes if not.

  Raises:
    ConfigError: the target holds something, or another process is making it.
  """
  expect_room(target)
  partial = target.with_name(f'{target.name}.moejax-partial')
  partial.mkdir(parents=True, exist_ok=True)
  # The lock goes with the process, however that dies.
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
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
  finally:
    os.close(lock)
  parent = os.open(target.parent, os.O_RDONLY)
  os.fsync(parent)
  os.close(parent)


def _clear(directory: Path) -> None:
  """Removes what a process that was killed left in the directory."""
  for stale in directory.iterdir():
    if stale.is_dir() and not stale.is_symlink():
      shutil.rmtree(stale)
    else:
      stale.unlink()


def inside(directory: Path, name: str) -> Path:
  """The path of a file in the directory.

  Raises:
    ConfigError: it leads out of the directory, and not to the blobs of a cache of snapshots.
  """
  root = directory.resolve()
  homes = [root]
  if root.parent.name == 'snapshots':
    homes.append(root.parents[1] / 'blobs')
  try:
    target = (root / name).resolve()
  except RuntimeError as error:  # links in a circle
    found = f'{name!r:.200} ({error})'
    raise bad_file(directory, 'the name of a file in it', found, FETCH_AGAIN) from error
  if not any(target.is_relative_to(home) for home in homes):
    found = f'{name!r:.200}, which is {target}'
    raise bad_file(directory, 'files inside it only', found, 'copy the file there')
  return directory / name


def read_json(directory: Path, name: str) -> dict[str, object]:
  """The JSON object in a file of the directory; {} without the file.

  Raises:
    ConfigError: the file holds another thing, or is not inside the directory.
  """
  path = inside(directory, name)
  return parse_json_object(path, path.read_bytes()) if path.is_file() else {}


def parse_json_object(path: Path, raw: bytes) -> dict[str, object]:
  """The JSON object in the bytes of the file at `path`.

  Raises:
    ConfigError: it is none, says one thing twice, or has a name that would garble a terminal or a log.
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
    found = json.loads(raw.decode(), object_pairs_hook=unique)
  except ConfigError:
    raise
  except (ValueError, RecursionError) as error:
    raise bad_file(path, 'JSON', f'{type(error).__name__}: {error}') from error
  if not isinstance(found, dict):
    raise bad_file(path, 'a JSON object', type(found).__name__)
  return found


def bad_file(path: Path, expected: object, found: object, remedy: str = DAMAGED) -> ConfigError:
  """The error for a file that cannot be read as it is."""
  return ConfigError(f'{path}: expected {expected}, found {found}; {remedy}')
