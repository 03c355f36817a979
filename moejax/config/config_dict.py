"""Config dataclasses to ml_collections' ConfigDict and back. Knows no model.

All problems of a tree are reported in one error, each by its full path.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from moejax.config.checks import (
  INT32,
  ConfigError,
  check,
  finite_problem,
  frozendict,
  is_finite,
  problem_if,
  unknown,
)

T = TypeVar('T')


def to_config_dict(cfg: object) -> ConfigDict:
  """Returns the dataclass as a locked ConfigDict; its tables stay open to new names and types."""
  contents = dict(vars(cfg))
  tables = [name for name, value in contents.items() if isinstance(value, frozendict)]
  for name, value in vars(cfg).items():
    if name in tables:
      contents[name] = ConfigDict(dict(value), type_safe=False)
    elif dataclasses.is_dataclass(value):
      contents[name] = to_config_dict(value)
  config = ConfigDict(contents).lock()
  # lock() goes down into all that the dict holds, hence the tables are opened afterwards.
  for name in tables:
    config[name].unlock()
  return config


def from_config_dict(cls: type[T], d: Mapping | ConfigDict) -> T:
  """Returns the checked dataclass; a field that `d` leaves out has its default.

  The modules in its field `plugins`, if it has one, are imported first: the checks know the names
  that they register.

  Raises:
    ConfigError: all problems of the tree: plugins that cannot be imported, unknown names, wrong
      types, and what the checks of each section say.
  """
  problems = import_plugins(d['plugins']) if 'plugins' in d else []
  config = _build(cls, d, 'config', problems)
  check(*problems)
  return config


def import_plugins(names: object) -> list[str]:
  """Imports modules by name, and returns a problem for each that cannot be imported.

  names: a tuple or list of text; another value is for the check of types to refuse.
  """
  is_list = isinstance(names, (tuple, list))
  problems = []
  for name in names if is_list else ():
    try:
      importlib.import_module(name)
    except Exception as error:  # the module is the user's: it may raise anything
      problems.append(
        f'config.plugins: {name!r}: {type(error).__name__}: {error}; name a module, as '
        "('my.losses',), whose folder is on PYTHONPATH"
      )
  return problems


def _build(cls: type[T], d: Mapping | ConfigDict, path: str, problems: list[str]) -> T:
  """Returns one section, and adds what is wrong with it to `problems`."""
  hints = get_type_hints(cls)
  problems += [unknown(f'{path}.{name}', hints) for name in d.keys() if name not in hints]
  # Not cls(...): __init__ would stop at the first check that fails, and the rest would go unseen.
  config = object.__new__(cls)
  for name, default in vars(cls()).items():
    value = default
    if name in d:
      value = _typed(hints[name], d[name], default, f'{path}.{name}', problems)
    object.__setattr__(config, name, value)
  try:
    config.__post_init__()
  except ConfigError as error:
    problems += [f'{path}: {problem}' for problem in error.problems]
  return config


def _typed(hint: type, value: object, default: object, path: str, problems: list[str]) -> object:
  """Returns the value as the type that the hint asks for.

  Where it has another type, or is no number to compute with, adds that to `problems` and returns
  the default, so that the checks of the section can still run.
  """
  kind, args = get_origin(hint) or hint, get_args(hint)
  is_mapping = isinstance(value, (Mapping, ConfigDict))
  if dataclasses.is_dataclass(kind) and is_mapping:
    return _build(kind, value, path, problems)
  if kind is frozendict and is_mapping:
    return _typed_table(value, path, problems)
  if kind is tuple and isinstance(value, (tuple, list)):
    item_hints = _item_hints(args, value)
    if len(item_hints) == len(value):
      return tuple(
        _typed(item_hint, item, item, f'{path}[{i}]', problems)
        for i, (item_hint, item) in enumerate(zip(item_hints, value))
      )
  # type() and not isinstance: True is an int, and no number of layers. JSON writes 1.0 as 1.
  elif type(value) is kind or (kind is float and type(value) is int):
    problem = _number_problem(path, kind, value) if kind in (int, float) else ''
    if not problem:
      return kind(value)
    problems.append(problem)
    return default
  wanted = hint if args else kind.__name__
  problems.append(f'{path}={value!r} is {type(value).__name__}; give {wanted}')
  return default


def _number_problem(path: str, kind: type, value: float) -> str:
  """Returns the problem of a number that no program could hold, '' for any other.

  kind: int or float, as the field has it.
  """
  if kind is float:
    return problem_if(not is_finite(value), finite_problem(path, value))
  # Steps, rows and sizes are counted in int32; a seed is none of these, and has its own limit.
  is_seed = path.endswith('seed')
  return problem_if(abs(value) > INT32 and not is_seed, f'{path}={value}: use {INT32} at most')


def _typed_table(
  table: Mapping[str, object] | ConfigDict, path: str, problems: list[str]
) -> frozendict:
  """Returns a table, each of whose entries may be text or a number."""
  entries = {}
  for name, value in table.items():
    hint = str if type(value) is str else float
    # Tables hold weights and coefficients: 1 is a value that no other check objects to.
    entries[name] = _typed(hint, value, 1.0, f'{path}.{name}', problems)
  return frozendict(entries)


def _item_hints(args: tuple[type, ...], value: tuple | list) -> list[type]:
  """Returns the type of each item of a tuple whose hint is `tuple[*args]`."""
  if args[1:] == (...,):  # tuple[int, ...]: as many as there are, all of one type
    return [args[0]] * len(value)
  return list(args) or [type(item) for item in value]  # plain `tuple`: whatever they are
