"""What a config dataclass is made of: its error, its checks, and a table that can be hashed.

Import these from moejax.config.
"""

import difflib
from collections.abc import Collection
from typing import NoReturn


class ConfigError(ValueError):
  """All that is wrong with a config: `.problems`, which are also the lines of the message."""

  def __init__(self, *problems: str) -> None:
    super().__init__('\n'.join(problems))
    self.problems = problems


def check(*problems: str) -> None:
  """Raises ConfigError of the problems that are not ''; the last line of every `__post_init__`.

  All problems go into one error, so that a person mends a config once and not line by line.
  """
  real_problems = [problem for problem in problems if problem]
  if real_problems:
    raise ConfigError(*real_problems)


def problem_if(wrong: object, problem: str) -> str:
  """Returns the problem where something is wrong, '' where it is not: an argument of `check`.

  The text is made in any case: an index in it that may fail has to be guarded by the caller.
  """
  return problem if wrong else ''


def at_least(least: float, config: object, *fields: str, meaning: str = '') -> list[str]:
  """Returns a problem for each of the fields of a config that is less than `least`, or NaN.

  Args:
    least: the smallest value that will do.
    config: the dataclass that has the fields.
    *fields: their names; the problems come in this order.
    meaning: what the least value stands for, as in 'use 0 (off) or more'; '' for nothing special.
  """
  explanation = f' ({meaning})' if meaning else ''
  remedy = f'use {least}{explanation} or more'
  values = {name: getattr(config, name) for name in fields}
  # `not value >= least` and not `value < least`: every comparison with NaN is false.
  return [f'{name}={value}: {remedy}' for name, value in values.items() if not value >= least]


def not_one_of(name: str, value: str, known: Collection[str]) -> str:
  """Returns the problem of a name that is not in a table, with all that are; '' where it is."""
  return problem_if(value not in known, f'{name}={value!r} is not one of {sorted(known)}')


def unknown(path: str, known: Collection[str]) -> str:
  """Returns the problem of a field that does not exist.

  It suggests the name nearest to the last part of the path, or all names where none is near.
  """
  name = path.rpartition('.')[2]
  suggestions = difflib.get_close_matches(name, known, n=1) or sorted(known)
  return f'{path}: no such field; did you mean {" or ".join(suggestions)}?'


class frozendict(dict):
  """A dict that hashes and cannot change: a config with such a table can be static under jit."""

  def __hash__(self) -> int:
    return hash(frozenset(self.items()))

  def __reduce__(self) -> tuple[type, tuple[dict]]:
    # By default copy and pickle make an empty one and then fill it, which _refuse_change refuses.
    return frozendict, (dict(self),)

  def _refuse_change(self, *args: object, **kwargs: object) -> NoReturn:
    raise TypeError(f'{self!r} is frozen; make a new one')

  __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse_change
