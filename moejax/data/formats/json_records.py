"""Documents of JSON files: a field of each record, a record a line or in one array."""

import json
from collections.abc import Iterator

from moejax.config import ConfigError
from moejax.data.formats.byte_stream import numbered_lines, open_bytes, read_whole


def read_json_lines(path: str, text_field: str) -> Iterator[str]:
  """Yields the text of each line of a file, which may be packed; blank lines are passed over.

  Raises:
    ConfigError: a line is not a JSON object with a string of that name.
  """
  with open_bytes(path) as file:
    for number, line in numbered_lines(file, path):
      where = f'{path}:{number}'
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error
      yield _text_of_record(record, text_field, f'{where}: a line')


def read_json_records(path: str, text_field: str) -> Iterator[str]:
  """Yields the text of each record of an array, or of one record; each may be the text itself.

  Many a .json has a record a line: it is read as what it is. An array is held in memory whole.
  """
  with open_bytes(path) as file:
    content = read_whole(file, path)
  try:
    records = json.loads(content)
  except json.JSONDecodeError as error:
    if error.msg != 'Extra data':
      raise _not_json(path, error) from error
    yield from read_json_lines(path, text_field)
    return
  except (ValueError, RecursionError) as error:
    raise _not_json(path, error) from error
  if not isinstance(records, list):
    records = [records]
  for number, record in enumerate(records, 1):
    if isinstance(record, str):
      record = {text_field: record}
    yield _text_of_record(record, text_field, f'{path}: record {number}')


def _not_json(where: str, error: Exception) -> ConfigError:
  """Returns the error for what is no JSON, or is nested deeper than Python reads."""
  kind = type(error).__name__
  return ConfigError(f'{where}: expected JSON, found {kind}: {error}; mend it or leave it out')


def _text_of_record(record: object, text_field: str, what: str) -> str:
  """Returns the text of a record; `what` names the record in errors."""
  try:
    text = record[text_field]
    text.encode()  # JSON can spell half of a surrogate pair, which is no text
    return text
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f'{what} must be a JSON object with a string "{text_field}" ({error!r}); data.text_field '
      'names another field'
    ) from error
