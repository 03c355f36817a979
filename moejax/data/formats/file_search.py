"""Which files a path names: globs and folders, each file once."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path

from moejax.config import ConfigError, check, problem_if
from moejax.runtime.files import inside, read_json

logger = logging.getLogger('moejax')

# Hugging Face's save_to_disk: of a dataset, and of a folder of its splits.
DATASET_FILES = ('state.json', 'dataset_info.json')
SPLITS_FILE = 'dataset_dict.json'
LINKS_SHOWN = 3  # in a message


def files_of_path(path: str, can_read: Callable[[str], object], kinds: str) -> list[str]:
  """Returns the files that globs and folders name, with commas between, sorted; each file once.

  Of a folder, the files that can be read, those of folders in it too; the hidden ones, and folders
  that are links, are left out.

  Args:
    path: the globs and folders.
    can_read: tells by its name whether a file can be read.
    kinds: the files that can be read, for errors.

  Raises:
    ConfigError: a pattern matches nothing, or something that cannot be read.
  """
  patterns = [pattern.strip() for pattern in path.split(',') if pattern.strip()]
  matches = {pattern: _files_of_pattern(pattern, can_read) for pattern in patterns}
  problems = [
    f'path={pattern!r} matches no file that can be read, of {kinds}'
    for pattern in patterns
    if not matches[pattern]
  ]
  if not patterns:
    problems.append(f'path={path!r} names no file')
  # A set, because patterns may overlap.
  paths = sorted(set().union(*matches.values()))
  unreadable = [file for file in paths if not can_read(file)]
  if unreadable:
    problems.append(f'path={path!r} matches {unreadable[0]}, not one of {kinds}')
  check(*problems)
  return _each_once(paths)


def _files_of_pattern(pattern: str, can_read: Callable[[str], object]) -> list[str]:
  """Returns the files of a folder, or what a glob matches without folders."""
  path = os.path.expanduser(pattern)
  if os.path.isdir(path):
    return list(_files_in(path, can_read))
  return [match for match in glob(path, recursive=True) if not os.path.isdir(match)]


def _files_in(root: str, can_read: Callable[[str], object]) -> Iterator[str]:
  """Yields the files of a folder, and of those in it, that can be read."""
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith('.')]  # os.walk goes into these
    if SPLITS_FILE in names:
      splits = ', '.join(sorted(folders))
      raise ConfigError(f'path={folder!r} holds the splits {splits}: give the folder of one')
    if all(name in names for name in DATASET_FILES):
      yield from _files_of_dataset(Path(folder))
      continue
    for name in names:
      if can_read(name) and not name.startswith('.'):
        yield os.path.join(folder, name)


def _files_of_dataset(folder: Path) -> Iterator[str]:
  """Yields the files of a dataset of save_to_disk, as its state names them."""
  state = read_json(folder, DATASET_FILES[0])
  try:
    names = [str(entry['filename']) for entry in state['_data_files']]
  except (KeyError, TypeError) as error:
    raise ConfigError(f'{folder}/state.json names no files ({error!r}); save it again') from error
  for name in names:
    yield str(inside(folder, name))


def _each_once(paths: list[str]) -> list[str]:
  """Returns the paths without those that lead to a file that another leads to, which is told.

  Raises:
    ConfigError: a path leads to nothing, or to what may have no end, as a FIFO or a device.
  """
  first_paths: dict[tuple[int, int], str] = {}  # (device, inode) -> path
  again: list[str] = []
  for path in paths:
    try:
      status = os.stat(path)
    except OSError as error:
      raise ConfigError(f'{error}: the source has a file that cannot be read') from error
    kind = _kind_of_special(status.st_mode)
    check(problem_if(kind, f'{path} is {kind} and not a file; leave it out or copy it to one'))
    first = first_paths.setdefault((status.st_dev, status.st_ino), path)
    if first != path:
      again.append(f'{path} is {first}')
  if again:
    shown = '; '.join(again[:LINKS_SHOWN])
    more = ', and more' if len(again) > LINKS_SHOWN else ''
    logger.warning('%d links to files that are read already: %s%s', len(again), shown, more)
  return list(first_paths.values())


def _kind_of_special(mode: int) -> str:
  """Returns what a path leads to that is not a regular file, '' for a regular file."""
  kinds: dict[str, Callable[[int], bool]] = {
    'a FIFO': stat.S_ISFIFO,
    'a socket': stat.S_ISSOCK,
    'a device': lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
  }
  return next((kind for kind, is_kind in kinds.items() if is_kind(mode)), '')
