"""What a config dataclass is made of. Import ConfigError, check and frozendict from moejax.config."""

import difflib
from collections.abc import Collection
from typing import NoReturn


class ConfigError(ValueError):
  """All that is wrong with a config: `.problems`, one a line in the message."""

  def __init__(self, *problems: str) -> None:
    super().__init__('\n'.join(problems))
    self.problems = problems


def check(*problems: str) -> None:
  """Raises ConfigError of the problems that are not ''; the last line of every `__post_init__`."""
  if found := [p for p in problems if p]:
    raise ConfigError(*found)


def problem_if(wrong: object, problem: str) -> str:
  """The problem where something is wrong, '' where it is not: an argument of `check`."""
  return problem if wrong else ''


def at_least(least: float, config: object, *fields: str, meaning: str = '') -> list[str]:
  """A problem for each of the fields of a config that is less than `least`, or not a number.

  meaning: what the least value stands for, as in 'use 0 (off) or more'.
  """
  values = {name: getattr(config, name) for name in fields}
  remedy = f'use {least}{meaning and f" ({meaning})"} or more'
  return [f'{name}={value}: {remedy}' for name, value in values.items() if not value >= least]


def not_one_of(name: str, value: str, known: Collection[str]) -> str:
  """The problem of a name that is not in a table, with all that are; '' where it is."""
  return problem_if(value not in known, f'{name}={value!r} is not one of {sorted(known)}')


def unknown(path: str, known: Collection[str]) -> str:
  """The message for a field that is not there: the nearest name, or all of them where none is near."""
  near = difflib.get_close_matches(path.rpartition('.')[2], known, 1) or sorted(known)
  return f'{path}: no such field; did you mean {" or ".join(near)}?'


class frozendict(dict):
  """A dict that hashes and does not change, so that a config with a table can be static under jit."""

  def __hash__(self) -> int:
    return hash(frozenset(self.items()))

  def __reduce__(self) -> tuple[type, tuple[dict]]:
    return frozendict, (dict(self),)  # copy and pickle would otherwise fill an empty one

  def _frozen(self, *args: object, **kwargs: object) -> NoReturn:
    raise TypeError(f'{self!r} is frozen; make a new one')

  __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _frozen
