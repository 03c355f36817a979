"""What `--help` says of a config: every field by section, with its value, meaning and choices.

Nothing is written for it: meanings are those of the docstrings and comments of the dataclasses, and
choices are what their own checks answer when a field has a name that is not known.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import get_type_hints

from ml_collections import ConfigDict

from moejax.config.checks import ConfigError

WIDTH = 100  # columns
NO_NAME = '?'  # what no row of a table is called


def help_lines(cls: type, config: ConfigDict, prefix: str = 'config') -> Iterator[str]:
  """Yields the lines of a section and of those below it.

  Args:
    cls: the dataclass of the section.
    config: its values, as a config file gives them.
    prefix: path of the section.
  """
  headline = inspect.getdoc(cls).partition('\n\n')[0].replace('\n', ' ')
  yield from ('', *_wrapped(f'{prefix}: {headline}', '', '  '))
  meanings, hints = field_meanings(cls), get_type_hints(cls)
  sections = []
  for name, value in config.items():
    path = f'{prefix}.{name}'
    if name in hints and dataclasses.is_dataclass(hints[name]):
      sections.append((hints[name], value, path))
      continue
    if isinstance(value, ConfigDict):  # a table
      yield f'  --{path}.NAME=VALUE'
    else:
      yield f'  --{path}={value!r}'
    said = meanings[name].rstrip('.') if name in meanings else ''
    meaning = '; '.join(filter(None, [said, choices(cls, name)]))
    yield from _wrapped(meaning, ' ' * 6, ' ' * 6)
    if isinstance(value, ConfigDict):
      yield from (f'  --{path}.{entry}={item!r}' for entry, item in value.items())
  for section_cls, section, path in sections:
    yield from help_lines(section_cls, section, path)


def _wrapped(text: str, first: str, later: str) -> list[str]:
  """Returns the text in lines, each after its indent."""
  return textwrap.wrap(
    text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
  )


def field_meanings(cls: type) -> dict[str, str]:
  """Returns field -> what its dataclass says of it; a field of which it says nothing has no entry.

  That is the docstring's paragraph `name: text` or `name, other: text`, or else the comment behind
  or above the field.
  """
  fields = {field.name for field in dataclasses.fields(cls)}
  meanings = {name: text for name, text in _comments(cls) if name in fields}
  paragraphs = re.findall(r'^(\w+(?:, \w+)*): (.*(?:\n +\S.*)*)', inspect.getdoc(cls), re.MULTILINE)
  for names, text in paragraphs:
    for name in fields.intersection(names.split(', ')):
      meanings[name] = ' '.join(text.split())
  return meanings


def _comments(cls: type) -> Iterator[tuple[str, str]]:
  """Yields (field, comment) for each comment that stands behind or above a field."""
  above: list[str] = []
  for line in inspect.getsource(cls).splitlines():
    field = re.match(r'\s+(\w+): [^#]*(?:#\s*(.*))?$', line)
    comment = re.match(r'\s+#\s*(.*)$', line)
    if comment:
      above.append(comment[1])
      continue
    if field and (field[2] or above):
      yield field[1], field[2] or ' '.join(above)
    above = []


def choices(cls: type, name: str) -> str:
  """Returns the names that a field may have, as 'one of [...]'; '' where it takes no names."""
  if not isinstance(getattr(cls(), name), str):
    return ''
  try:
    dataclasses.replace(cls(), **{name: NO_NAME})
  except ConfigError as error:
    for problem in error.problems:
      known = re.match(rf'{name}={NO_NAME!r} is not one of ([^:;]*)'.replace('?', r'\?'), problem)
      if known:
        return f'one of {known[1].strip()}'
  return ''
