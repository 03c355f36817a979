"""Documents of Parquet and Arrow files: the strings of one column, some rows at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moejax.config import ConfigError
from moejax.data.formats.byte_stream import expect_document, pyarrow_for

if TYPE_CHECKING:
  import pyarrow

ROWS = 256  # of a Parquet file in memory at once
ARROW_FILE = b'ARROW1'  # how Arrow's file format begins; its stream format does not


def read_parquet(path: str, text_field: str) -> Iterator[str]:
  """Yields the strings of a column of a Parquet file."""
  pyarrow_for(path)
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(path) as table:
    _expect_strings(table.schema_arrow, text_field, path)
    # Only now: a column that is not there would silently be none.
    batches = table.iter_batches(batch_size=ROWS, columns=[text_field])
    yield from _strings(batches, path)


def read_arrow(path: str, text_field: str) -> Iterator[str]:
  """Yields the strings of a column of an Arrow file, such as Hugging Face's save_to_disk writes."""
  pyarrow = pyarrow_for(path)
  with open(path, 'rb') as file:
    is_file_format = file.read(len(ARROW_FILE)) == ARROW_FILE
  with pyarrow.memory_map(path) as mapped:
    if is_file_format:
      table = pyarrow.ipc.open_file(mapped)
      batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
      table = batches = pyarrow.ipc.open_stream(mapped)
    _expect_strings(table.schema, text_field, path)
    yield from _strings((batch.select([text_field]) for batch in batches), path)


def _expect_strings(schema: 'pyarrow.Schema', text_field: str, path: str) -> None:
  """Raises ConfigError where the table has no such column, or one of something else."""
  from pyarrow import types

  if schema.names.count(text_field) != 1:
    columns = ', '.join(schema.names)
    raise ConfigError(
      f'{path} has no column {text_field!r}; set data.text_field to one of {columns}'
    )
  kind = schema.field(text_field).type
  if types.is_dictionary(kind):
    kind = kind.value_type
  is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
  if not is_text:
    raise ConfigError(
      f'{path}: the column {text_field!r} holds {kind}, not strings; set data.text_field to another'
    )


def _strings(batches: Iterator['pyarrow.RecordBatch'], path: str) -> Iterator[str]:
  """Yields the strings of batches of one column; ConfigError where one is missing or too large."""
  row = 0
  for batch in batches:
    for text in batch.column(0).to_pylist():
      row += 1
      if text is None:
        raise ConfigError(f'{path}: row {row} has no text (null); leave such rows out')
      expect_document(len(text), f'{path}: row {row}')
      yield text
