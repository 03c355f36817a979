"""Which reader takes which file.   path -> READERS -> documents"""

import os
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moejax.config import ConfigError
from moejax.data.formats.arrow_tables import read_arrow, read_parquet
from moejax.data.formats.byte_stream import PACKED
from moejax.data.formats.json_records import read_json_lines, read_json_records
from moejax.data.formats.text_file import read_text

TEXT_FILES = ('.txt', '.md', '.py')  # of which each is a document, or cut at a separator
TABLES = ('.parquet', '.arrow')  # which pack their columns themselves


class Layout(NamedTuple):
  """How documents lie in files."""

  text_field: str = 'text'  # of a JSON record, and the column of a table
  separator: str = ''  # between the documents of a text file; '': the file is one


def suffix_of(path: str) -> str:
  """Returns the row of READERS that reads the file, '' where none does."""
  stem, suffix = os.path.splitext(path)
  if suffix in PACKED:
    suffix = os.path.splitext(stem)[1]
    return suffix if suffix in READERS and suffix not in TABLES else ''
  return suffix if suffix in READERS else ''


def read_documents(path: str, layout: Layout) -> Iterator[str]:
  """Yields the documents of one file, in order.

  Raises:
    ConfigError: names the file, and the line or row where there is one.
  """
  try:
    yield from READERS[suffix_of(path)](path, layout)
  except ConfigError:  # it is a ValueError too
    raise
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{path} cannot be read as UTF-8 text: {error}; convert it, as with iconv -t UTF-8'
    ) from error
  except (OSError, EOFError, zlib.error, ValueError) as error:
    raise ConfigError(f'{path} cannot be read: {error}; mend it or leave it out') from error


def _text(path: str, layout: Layout) -> Iterator[str]:
  return read_text(path, layout.separator)


READERS: dict[str, Callable[[str, Layout], Iterator[str]]] = {
  **dict.fromkeys(TEXT_FILES, _text),
  '.jsonl': lambda path, layout: read_json_lines(path, layout.text_field),
  '.json': lambda path, layout: read_json_records(path, layout.text_field),
  '.parquet': lambda path, layout: read_parquet(path, layout.text_field),
  '.arrow': lambda path, layout: read_arrow(path, layout.text_field),
}
READABLE = f'{" ".join(READERS)}, those of text and JSON also {" ".join(PACKED)}'
