"""Files that are whole or not there, whoever writes them at the same time and whoever is killed doing so."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from moejax.config import ConfigError
from moejax.runtime.files import whole_file

logger = logging.getLogger('moejax')


def cached(path: Path, build: Callable[[], Iterable[bytes]]) -> np.ndarray:
  """The bytes of a cache file, memory-mapped, [n] u8; built where missing, torn or changed by a bit.

  The file ends in a digest of its name and bytes. It gets its name when it is whole, so a reader never sees
  half of it, two builders do each other no harm, and a file that is mapped is never written to.
  """
  try:
    if not _is_whole(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      _write(path, build())
    return np.memmap(path, np.uint8, 'r')[:-32]
  except OSError as error:
    raise ConfigError(
      f'{error}; set data.cache_dir to a folder with room that can be written to'
    ) from error


def _is_whole(path: Path) -> bool:
  if (
    not path.is_file() or path.is_symlink()
  ):  # a link is replaced by a file, and its target is not touched
    return False
  data = np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)
  whole = data[-32:].tobytes() == _seal(path, data[:-32]).digest()
  if not whole:
    logger.warning('%s is damaged: building it anew', path)
  return whole


def _seal(path: Path, data: np.ndarray | bytes) -> 'hashlib.blake2b':
  return hashlib.blake2b(data, digest_size=32, key=path.name[-64:].encode())


def _write(path: Path, chunks: Iterable[bytes]) -> None:
  for stale in path.parent.glob(f'{path.name}.*.tmp'):  # of a process killed in the act
    with contextlib.suppress(FileNotFoundError):
      if time.time() - stale.stat().st_mtime > 3600:
        stale.unlink()
  seal = _seal(path, b'')
  with whole_file(path) as file:
    for chunk in chunks:
      file.write(chunk)
      seal.update(chunk)
    file.write(seal.digest())
