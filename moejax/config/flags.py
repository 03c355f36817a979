"""The command line to one checked config: a config file, overrides by ml_collections, all problems at once.

argv -> get_config() of the file -> each override in turn -> from_config_dict. No model is known here.
"""

import difflib
import inspect
import runpy
import traceback
from typing import TypeVar, get_args

from absl import flags
from ml_collections import ConfigDict, config_flags

from moejax.config import ConfigError, check, from_config_dict, to_config_dict
from moejax.config.fields import walk_fields

T = TypeVar('T')


def parse_flags(argv: list[str], cls: type[T], default: str) -> T:
  """The config that `argv` (without the program's name) asks for; `default` is the file when it names none.

  Raises ConfigError with all that is wrong: what is bad is left out, and the rest is checked without it.
  """
  problems: list[str] = []
  path, workdir, rest = _split(argv, default, problems)
  config = _load(path, cls, problems)
  names = [name for name, _ in walk_fields(config)]
  for arg in rest:
    is_override = arg.startswith(('--config.', '--noconfig.'))
    problems += _override(config, arg, names) if is_override else [_stray(arg, names)]
  if workdir:
    config.workdir = workdir
  try:
    built = from_config_dict(cls, config)
  except ConfigError as error:
    problems += error.problems
  check(*problems)
  return built


def describe(argv: list[str], cls: type, default: str) -> str:
  """Every field of the config file that `argv` names, as the flag that would set it to what it is."""
  config = _load(_split(argv, default, [])[0], cls, [])
  return '\n'.join(f'  --config.{name}={value!r}' for name, value in walk_fields(config))


def _split(argv: list[str], default: str, problems: list[str]) -> tuple[str, str, list[str]]:
  """(--config, --workdir, all other arguments)."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', default, 'path of a config file', flag_values=values)
  flags.DEFINE_string('workdir', '', 'folder of the run', flag_values=values)
  try:
    rest = values(['', *argv], known_only=True)[1:]
  except flags.Error as error:  # only the last one can lack its value
    problems.append(f'{argv[-1]}: {error}')
    return _split(argv[:-1], default, problems)
  return values['config'].value, values['workdir'].value, rest


def _load(path: str, cls: type, problems: list[str]) -> ConfigDict:
  """What get_config() of FILE, or get_config(NAME) for FILE:NAME, gives; where that fails, `cls()` and a problem."""
  path, _, variant = path.partition(':')
  try:
    get_config = runpy.run_path(path)['get_config']
    takes = [
      get_args(p.annotation)
      for p in inspect.signature(get_config, eval_str=True).parameters.values()
    ]
    known = (
      takes[0] if takes else ('',)
    )  # its parameter's Literal; () where that is text: the file decides
    there = ' or '.join(f'{path}:{name}'.rstrip(':') for name in known)
    check(f'it has no variant {variant!r}; use {there}' if known and variant not in known else '')
    config = get_config(variant) if variant else get_config()
    if isinstance(config, ConfigDict):
      return config
    problems.append(
      f'--config={path}: get_config() gives {type(config).__name__}; give a ConfigDict'
    )
  except Exception as error:  # the file is the user's program: anything may come out of it
    lines = [
      frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
    ]
    where = f'{path}, line {lines[-1]}' if lines else path
    problems.append(f'--config={where}: {type(error).__name__}: {error}')
  return to_config_dict(cls())


def _override(config: ConfigDict, arg: str, names: list[str]) -> list[str]:
  """Sets one field through ml_collections' flag for its type, which dies at an error: hence one at a time."""
  name = arg.partition('=')[0].partition('.')[2]
  *path, field = name.split('.')
  holder: object = config
  for part in path:
    holder = holder[part] if isinstance(holder, ConfigDict) and part in holder else None
  is_table = isinstance(holder, ConfigDict) and not holder.is_locked
  if not is_table and (holder is None or field not in holder):
    return [f'--config.{name}: no such field; {_nearest(name, names)}']
  old = holder[field] if field in holder else 0.0
  if is_table and field in holder:
    del holder[field]  # a new entry may have another type, such as a schedule for a number
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      'config',
      config,
      flag_values=values,
      sys_argv=['', arg],
      lock_config=False,
      accept_new_attributes=is_table,
    )
    values(['', arg])
  except (flags.Error, ValueError, TypeError):
    return [f'{arg}: give {type(old).__name__}, such as --config.{name}={old!r}']
  return []


def _stray(arg: str, names: list[str]) -> str:
  name, _, value = arg.lstrip('-').partition('=')
  return f'{arg}: no such flag; {_nearest(name, names, value)}'


def _nearest(name: str, names: list[str], value: str = '') -> str:
  """The remedy for a name that is not there: nearest by its last part, then by the whole path."""
  tails = {n: n.rpartition('.')[2] for n in names}
  tail = difflib.get_close_matches(name.rpartition('.')[2], tails.values(), 1)
  near = difflib.get_close_matches(name, [n for n in names if tails[n] in tail], 1, 0)
  return f'did you mean --config.{near[0]}={value}?' if near else '--help lists all'
