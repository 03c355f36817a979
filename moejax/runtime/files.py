"""A new directory that is whole under its name, or not there: made beside it, and renamed."""

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


def expect_room(target: Path) -> None:
  """ConfigError where something is already: worth asking before long work."""
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ConfigError(f'{target} is there and not empty; name another directory, or move it away')


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
  """An empty directory beside the target, which becomes the target when the block ends well, and vanishes if not."""
  expect_room(target)
  partial = target.with_name(f'{target.name}.moejax-partial')
  partial.mkdir(parents=True, exist_ok=True)
  lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # goes with the process, however that dies
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f'{target} is being written by another process; wait for it, or name another') from None
    try:
      for stale in partial.iterdir():  # of a process that was killed
        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
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


def write_whole(path: Path, text: str) -> None:
  """A file with this text, or what was there before; a link in its place is not followed."""
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
  temporary.write_bytes(text.encode())
  temporary.replace(path)


AGAIN = 'fetch or export the directory again'


def inside(directory: Path, name: str) -> Path:
  """The file's path; ConfigError where it leads out of the directory, but to the blobs of a cache of snapshots."""
  root = directory.resolve()
  homes = [root, root.parents[1] / 'blobs'] if root.parent.name == 'snapshots' else [root]
  try:
    target = (root / name).resolve()
  except RuntimeError as error:  # links in a circle
    raise bad_file(directory, 'the name of a file in it', f'{name!r:.200} ({error})', AGAIN) from error
  if not any(target.is_relative_to(home) for home in homes):
    raise bad_file(directory, 'files inside it only', f'{name!r:.200}, which is {target}', 'copy the file there')
  return directory / name


def read_json(directory: Path, name: str) -> dict[str, object]:
  """The JSON object in a file of the directory, {} without the file; ConfigError where it is another thing."""
  path = inside(directory, name)
  return parse_json_object(path, path.read_bytes()) if path.is_file() else {}


DAMAGED = 'the file is damaged or cut short: fetch or export it again'


def bad_file(path: Path, expected: object, found: object, remedy: str = DAMAGED) -> ConfigError:
  """The error for a file of a model that cannot be read as it is."""
  return ConfigError(f'{path}: expected {expected}, found {found}; {remedy}')


def parse_json_object(path: Path, raw: bytes) -> dict[str, object]:
  """The JSON object in the bytes; ConfigError where it is none or says one thing twice."""
  def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
      raise bad_file(path, 'every name once', f'duplicated {twice[0]!r}')
    if odd := [name for name, _ in pairs if not name.isprintable()]:  # it would garble a terminal or a log
      raise bad_file(path, 'names that can be printed', repr(odd[0]))
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


@contextlib.contextmanager
def durable(path: Path) -> Iterator[io.BufferedWriter]:
  """A new file to write to, on the disk when the block ends: a rename after it cannot overtake its bytes."""
  with open(path, 'xb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
