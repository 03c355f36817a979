"""Config dataclasses to ml_collections' ConfigDict and back, every problem told at once; knows no model."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from moejax.config import ConfigError, check, frozendict, unknown

T = TypeVar('T')


def to_config_dict(cfg: object) -> ConfigDict:
  """The dataclass as a locked ConfigDict, whose tables alone stay open to new names and other types."""
  fields = vars(cfg)
  tables = {
    k: ConfigDict(dict(v), type_safe=False) for k, v in fields.items() if isinstance(v, frozendict)
  }
  nested = {k: to_config_dict(v) for k, v in fields.items() if dataclasses.is_dataclass(v)}
  config = ConfigDict(fields | tables | nested).lock()
  for name in tables:
    config[name].unlock()
  return config


def from_config_dict(cls: type[T], d: Mapping | ConfigDict) -> T:
  """The checked dataclass, or a ConfigError of all its problems; what `d` leaves out has its default."""
  problems: list[str] = []
  config = _build(cls, d, 'config', problems)
  check(*problems)
  return config


def _build(cls: type[T], d: Mapping | ConfigDict, path: str, problems: list[str]) -> T:
  hints, config = (
    get_type_hints(cls),
    object.__new__(cls),
  )  # __init__ would stop at the first failing check
  problems += [unknown(f'{path}.{name}', hints) for name in d.keys() if name not in hints]
  for name, value in vars(cls()).items():
    value = _typed(hints[name], d[name], value, f'{path}.{name}', problems) if name in d else value
    object.__setattr__(config, name, value)
  try:
    config.__post_init__()
  except ConfigError as error:
    problems += [f'{path}: {p}' for p in error.problems]
  return config


def _typed(hint: type, value: object, default: object, path: str, problems: list[str]) -> object:
  kind, args, is_table = (
    get_origin(hint) or hint,
    get_args(hint),
    isinstance(value, (Mapping, ConfigDict)),
  )
  if dataclasses.is_dataclass(kind) and is_table:
    return _build(kind, value, path, problems)
  if kind is frozendict and is_table:
    hints = {k: str if type(v) is str else float for k, v in value.items()}
    return frozendict(
      {k: _typed(hints[k], v, v, f'{path}.{k}', problems) for k, v in value.items()}
    )
  if kind is tuple and isinstance(value, (tuple, list)):
    hints = args[:1] * len(value) if args[1:] == (...,) else args or [type(v) for v in value]
    if len(hints) == len(value):
      return tuple(
        _typed(h, v, v, f'{path}[{i}]', problems) for i, (h, v) in enumerate(zip(hints, value))
      )
  elif type(value) is kind or (kind is float and type(value) is int):
    return kind(value)
  problems.append(
    f'{path}={value!r} is {type(value).__name__}; give {hint if args else kind.__name__}'
  )
  return default
