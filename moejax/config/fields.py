"""The fields of a nested config, one after another, each by its dotted path.

All code that compares, prints or records configs walks them here.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict


class Field(NamedTuple):
  """A field that holds a value, and not a section of further fields."""

  path: str  # from the root of the config, as in 'model.moe.router.top_k'
  value: object  # a table (frozendict) is one value


def walk_fields(config: object, prefix: str = '') -> Iterator[Field]:
  """Yields every field of a config in the order of definition, depth first.

  Args:
    config: a dataclass or a ConfigDict. The tables of a dataclass are values; a ConfigDict cannot
      tell a table from a section, so that each entry of a table is a field of its own.
    prefix: text before each path.
  """
  items = config.items() if isinstance(config, ConfigDict) else vars(config).items()
  for name, value in items:
    if isinstance(value, ConfigDict) or dataclasses.is_dataclass(value):
      yield from walk_fields(value, f'{prefix}{name}.')
    else:
      yield Field(prefix + name, value)


def is_under(path: str, sections: Collection[str]) -> bool:
  """Tells whether a field's path is one of these, or lies in one of these sections.

  Only whole parts of a path count: 'data.path' is not under 'dat'.
  """
  return any(path == section or path.startswith(f'{section}.') for section in sections)
