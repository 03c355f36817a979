"""Cache files that are whole or not there.

Several processes may build one file at the same time, and any of them may be killed doing so.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from moejax.config import ConfigError
from moejax.runtime.files import whole_file, write_whole

logger = logging.getLogger('moejax')

SEAL_BYTES = 32


def cache_directory(cache_dir: str) -> Path:
  """Returns the folder of the cache, which may not exist yet.

  cache_dir: as in DataConfig; '': where the system keeps caches.
  """
  if cache_dir:
    return Path(cache_dir).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'moejax'


def open_cached(path: Path, build: Callable[[], Iterable[bytes]]) -> np.ndarray:
  """Returns the bytes of a cache file, memory-mapped, [n] u8.

  The file is built where it is missing, torn or changed by a bit: it ends in a digest of its name
  and its bytes, the seal. It gets its name when it is whole, so that a reader never sees half of
  it, two builders do each other no harm, and a file that is mapped is never written to. It is
  digested once, and from then on known by its size and times: a start does not read terabytes.

  Args:
    path: of the file; its name tells what is in it.
    build: yields the bytes.

  Raises:
    ConfigError: it cannot be written or read.
  """
  try:
    if not _is_whole(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      _write(path, build())
      _note_whole(path)
    return np.memmap(path, np.uint8, 'r')[:-SEAL_BYTES]
  except OSError as error:
    raise ConfigError(
      f'{error}; set data.cache_dir to a folder with room that can be written to'
    ) from error


def _is_whole(path: Path) -> bool:
  """Tells whether there is such a file, and it is what was written under its name."""
  # A link counts as missing: it is then replaced by a file, and its target is not touched.
  if not path.is_file() or path.is_symlink():
    return False
  with contextlib.suppress(OSError):  # there is no note
    if _note_path(path).read_text() == _stamp_of(path):
      return True
  # An empty file cannot be mapped.
  data = np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)
  content, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
  is_whole = seal.tobytes() == _seal_of(path, content).digest()
  if is_whole:
    _note_whole(path)
  else:
    logger.warning('%s is damaged: building it anew', path)
  return is_whole


def _note_whole(path: Path) -> None:
  """Notes that the file as it lies there was found whole."""
  with contextlib.suppress(OSError):  # a cache that can only be read is digested each time
    write_whole(_note_path(path), _stamp_of(path))


def _note_path(path: Path) -> Path:
  return path.with_name(f'whole-{path.name}')


def _stamp_of(path: Path) -> str:
  """Returns what changes whenever the file is written, renamed or replaced."""
  status = path.stat()
  # Whoever sets the time of a file back still changes its ctime, and a file in its place its inode.
  return f'{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}'


def _seal_of(path: Path, content: np.ndarray | bytes) -> 'hashlib.blake2b':
  """Returns a hash to which more content may be added."""
  # With the name as its key: a whole file under another file's name does not pass.
  return hashlib.blake2b(content, digest_size=SEAL_BYTES, key=path.name[-64:].encode())


def _write(path: Path, chunks: Iterable[bytes]) -> None:
  """Writes the content and its seal."""
  seal = _seal_of(path, b'')
  with whole_file(path) as file:
    for chunk in chunks:
      file.write(chunk)
      seal.update(chunk)
    file.write(seal.digest())
