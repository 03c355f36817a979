"""The fields of a nested config, one after another, each by its dotted path.

Whoever compares, prints or records configs walks them here.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict


class Field(NamedTuple):
  """A field that holds a value, and not a section of further fields."""

  path: str  # 'model.moe.router.top_k'
  value: object


def walk_fields(config: object, prefix: str = '') -> Iterator[Field]:
  """Every field of a config, which is a dataclass or a ConfigDict, in order; `prefix` is put before each path."""
  items = config.items() if isinstance(config, ConfigDict) else vars(config).items()
  for name, value in items:
    if isinstance(value, ConfigDict) or dataclasses.is_dataclass(value):
      yield from walk_fields(value, f'{prefix}{name}.')
    else:
      yield Field(prefix + name, value)


def is_under(path: str, sections: Collection[str]) -> bool:
  """Whether a field's path is one of these, or lies in one of these sections."""
  return any(path == section or path.startswith(f'{section}.') for section in sections)
