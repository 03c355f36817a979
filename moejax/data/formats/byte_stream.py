"""Files opened as bytes, unpacked where they are packed. Nothing is read that has no end."""

import gzip
import io
from collections.abc import Iterator
from types import ModuleType
from typing import BinaryIO

from moejax.config import ConfigError

PACKED = ('.gz', '.zst')
# Bytes of the largest document, and so of a line: it is held in memory whole, a few times over.
LARGEST_DOCUMENT = 1 << 30


def open_bytes(path: str) -> BinaryIO:
  """Opens a file to be read as bytes; .gz and .zst are unpacked on the way."""
  if path.endswith('.gz'):
    return gzip.open(path)
  if path.endswith('.zst'):
    stream = pyarrow_for(path).input_stream(path, compression='zstd')
    return io.BufferedReader(stream)  # for its readline, which Arrow's stream has not
  return open(path, 'rb')


def pyarrow_for(path: str) -> ModuleType:
  """Returns the package pyarrow, which is of an extra; raises ConfigError where it is missing."""
  try:
    import pyarrow
  except ImportError as error:
    raise ConfigError(f"{path} is read by pyarrow: pip install 'moejax[data]'") from error
  return pyarrow


def read_whole(file: BinaryIO, path: str) -> bytes:
  """Returns the bytes of a file that is one document; ConfigError above LARGEST_DOCUMENT."""
  content = file.read(LARGEST_DOCUMENT + 1)
  expect_document(len(content), path)
  return content


def numbered_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
  """Yields the number, from 1, and the bytes of each line that is not blank.

  Raises:
    ConfigError: a line is above LARGEST_DOCUMENT.
  """
  number = 1
  while line := file.readline(LARGEST_DOCUMENT + 1):
    expect_document(len(line), f'{path}:{number}')
    if line.strip():
      yield number, line
    number += 1


def expect_document(size: int, where: str) -> None:
  """Raises ConfigError where a document of so many bytes is too large to be one."""
  if size > LARGEST_DOCUMENT:
    raise ConfigError(
      f'{where}: a document or line of more than {LARGEST_DOCUMENT} bytes; cut it into several, in '
      'a text file at a mark that data.separator names'
    )
