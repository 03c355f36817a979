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
