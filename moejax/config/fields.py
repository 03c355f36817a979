"""The fields of a nested config, one after another, each by its dotted path."""

import dataclasses
from collections.abc import Iterator


def parts(config: object, path: str = '') -> Iterator[tuple[str, str]]:
  """(name, value as text) of every field of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from parts(value, f'{path}{field.name}.')
    else:
      yield f'{path}{field.name}', repr(value)
