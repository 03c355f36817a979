"""What a config dataclass is made of: its error, its checks, and a table that can be hashed.

Import these from moejax.config.
"""

import difflib
import numbers
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import NoReturn

# Of float32, in which nearly all numbers of a config end: beyond the largest is inf, and below the
# smallest normal one, which TPUs make 0 of.
SMALLEST, LARGEST = 1.1754944e-38, 3.4028234e38
INT32 = 2**31 - 1  # the largest count
LARGEST_SEED = 2**32 - 1  # of a larger one JAX would take the last 32 bits


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


def at_most(most: int, config: object, *fields: str) -> list[str]:
  """Returns a problem for each of the fields of a config that is more than `most`."""
  values = {name: getattr(config, name) for name in fields}
  return [f'{name}={value}: use {most} at most' for name, value in values.items() if value > most]


def utf8_problem(name: str, text: str) -> str:
  """Returns the problem of text with bytes that are not UTF-8, as a shell may give; '' if none.

  Python keeps such a byte as half of a pair of surrogates, which no tokenizer takes.
  """
  try:
    text.encode()
  except UnicodeEncodeError:
    return f'{name}={text!r} is not UTF-8: give text in UTF-8'
  return ''


def above_zero(config: object, *fields: str) -> list[str]:
  """Returns a problem for each of the fields of a config that is 0 or less in float32, or NaN."""
  values = {name: getattr(config, name) for name in fields}
  remedy = f'use a number above 0, {SMALLEST:.2g} at least'
  return [f'{name}={value}: {remedy}' for name, value in values.items() if not value >= SMALLEST]


def is_finite(value: float) -> bool:
  """Whether float32 has a finite number for it. NaN, inf, 1e39 and 10**400 have none."""
  return abs(value) <= LARGEST  # so that a comparison with NaN, which is false, says no


def not_finite(config: object) -> list[str]:
  """Returns a problem for each number of a config that is not finite: `clip_norm=nan`.

  No field of ours has a meaning for inf. Tables and tuples are looked into, as `losses.x` and
  `windows[0]`; sections are not, since each checks itself. This goes first in a `__post_init__`:
  comparisons with NaN are false, and most checks are comparisons.
  """
  values: dict[str, object] = {}
  for name, value in vars(config).items():
    if isinstance(value, Mapping):
      values |= {f'{name}.{key}': entry for key, entry in value.items()}
    elif isinstance(value, tuple):
      values |= {f'{name}[{i}]': entry for i, entry in enumerate(value)}
    else:
      values[name] = value
  reals = {name: value for name, value in values.items() if isinstance(value, numbers.Real)}
  return [finite_problem(name, value) for name, value in reals.items() if not is_finite(value)]


def finite_problem(path: str, value: float) -> str:
  """Returns the problem of a number that is not finite."""
  return f'{path}={value!r}: use a finite number, {LARGEST:.1e} at most'


def not_one_of(name: str, value: str, known: Collection[str]) -> str:
  """Returns the problem of a name that is not in a table, with all that are; '' where it is."""
  return problem_if(value not in known, f'{name}={value!r} is not one of {sorted(known)}')


def url_problem(name: str, path: str) -> str:
  """Returns the problem of a path in an object store, as gs://bucket/run; '' for a local one.

  Without it, `s3://bucket` would be a folder named `s3:` beside the program.
  """
  scheme = re.match(r'[A-Za-z][\w+.-]*://', path)
  if not scheme:
    return ''
  return (
    f'{name}={path}: {scheme[0]} is not read or written here: mount it, as with gcsfuse or '
    's3fs, and give the path of the mount'
  )


def local_path(name: str, path: str) -> pathlib.Path:
  """Returns a path that a person has typed, with ~ for the home directory.

  A shell leaves the ~ of --out=~/run as it is. `name` is what errors call it, as --out.

  Raises:
    ConfigError: it is in an object store.
  """
  check(url_problem(name, path))
  return pathlib.Path(path).expanduser()


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
