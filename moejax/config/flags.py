"""The command line to one checked config: a config file, then overrides by ml_collections' flags.

argv -> get_config() of the file -> each override in turn -> from_config_dict

In the place of a file may stand the directory of a run, whose config is taken.
All problems of a command line are reported at once. Knows no model.
"""

import difflib
import inspect
import os
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

from absl import flags
from ml_collections import ConfigDict, config_flags

from moejax.config import ConfigError, check, from_config_dict, local_path, to_config_dict
from moejax.config.fields import walk_fields
from moejax.config.help_text import help_lines

T = TypeVar('T')
# Config files that can be named without their folder and their suffix.
NAMED_CONFIGS = Path(__file__).parents[1] / 'configs'
START_FLAG = '--config.init_from='
# Directory of a run, and whether a new run starts from it -> the config that the flags change.
ReadRun = Callable[[str, bool], ConfigDict]


def read_no_run(directory: str, is_source: bool) -> ConfigDict:
  """Refuses the directory, where runs are not known."""
  raise ConfigError(f'{directory} is a directory: name a config file')


def parse_flags(argv: list[str], cls: type[T], default: str, read_run: ReadRun = read_no_run) -> T:
  """Returns the config that a command line asks for.

  Args:
    argv: the arguments, without the program's name.
    cls: the dataclass of the config, which has a field `workdir`.
    default: the config file, where `argv` names none, and no run to start from either.
    read_run: reads a directory that stands in the place of a config file.

  Raises:
    ConfigError: all that is wrong; what is bad is left out, and the rest is checked without it.
  """
  problems: list[str] = []
  split = _split_flags(argv, default, problems)
  config = _load_config(split, cls, read_run, problems)
  names = [field.path for field in walk_fields(config)]
  for arg in _with_values(split.rest, config):
    if arg.startswith(('--config.', '--noconfig.')):
      problems += _override(config, arg, names)
    else:
      problems.append(_unknown_flag(arg, names))
  if split.workdir:
    config.workdir = split.workdir
  try:
    built = from_config_dict(cls, config)
  except ConfigError as error:
    problems += error.problems
  check(*problems)
  return built


def describe(argv: list[str], cls: type, default: str, read_run: ReadRun = read_no_run) -> str:
  """Returns a line for each field of the config file that `argv` names.

  A line is the flag that would set the field to the value that it has; its meaning is below.
  Problems of the command line are passed over.
  """
  config = _load_config(_split_flags(argv, default, []), cls, read_run, [])
  return '\n'.join(help_lines(cls, config))


class SplitFlags(NamedTuple):
  """A command line, taken apart."""

  config_file: str  # FILE or FILE:VARIANT of --config, or the directory of a run
  source: str  # of --config.init_from, where --config is not given: a run to start from; or ''
  workdir: str  # of --workdir; '' where it is not given
  rest: list[str]  # all other arguments, in order


def _split_flags(argv: list[str], default: str, problems: list[str]) -> SplitFlags:
  """Takes --config and --workdir out of the arguments."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', default, 'path of a config file', flag_values=values)
  flags.DEFINE_string('workdir', '', 'folder of the run', flag_values=values)
  try:
    rest = values(['', *argv], known_only=True)[1:]
  except flags.Error as error:
    # Both flags take a value, and only the last argument can lack one: try again without it.
    problems.append(f'{argv[-1]}: {error}')
    return _split_flags(argv[:-1], default, problems)
  source = ''
  if not values['config'].present:
    for arg in rest:
      if arg.startswith(START_FLAG):
        source = os.path.expanduser(arg.removeprefix(START_FLAG))
  # A shell leaves the ~ of --config=~/run as it is.
  config_file = os.path.expanduser(values['config'].value)
  return SplitFlags(config_file, source, values['workdir'].value, rest)


def _load_config(
  split: SplitFlags, cls: type, read_run: ReadRun, problems: list[str]
) -> ConfigDict:
  """Returns the config of the run or of the file that the command line names.

  Where that fails, adds to `problems` and returns the default config.
  """
  flag = START_FLAG if split.source else '--config='
  named = split.source or split.config_file
  try:
    path = str(local_path(flag.rstrip('='), named))
  except ConfigError as error:
    problems += error.problems
    return to_config_dict(cls())
  if not split.source and not os.path.isdir(path):
    return _load_config_file(path, cls, problems)
  try:
    return read_run(path, bool(split.source))
  except ConfigError as error:
    problems += [f'{flag}{named}: {problem}' for problem in error.problems]
    return to_config_dict(cls())


def _load_config_file(file: str, cls: type, problems: list[str]) -> ConfigDict:
  """Returns what get_config() of FILE gives, or get_config(VARIANT) for FILE:VARIANT.

  Where that fails, adds to `problems` and returns the default config, which the overrides can still
  be checked on.
  """
  path, _, variant = file.partition(':')
  try:
    path = _config_path(path)
    get_config = runpy.run_path(path)['get_config']
    _check_variant(get_config, path, variant)
    config = get_config(variant) if variant else get_config()
    if isinstance(config, ConfigDict):
      return config
    kind = type(config).__name__
    problems.append(f'--config={path}: get_config() gives {kind}; give a ConfigDict')
  except Exception as error:  # the file is the user's program: it may raise anything
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    where = f'{path}, line {lines[-1]}' if lines else path
    problems.append(f'--config={where}: {type(error).__name__}: {error}')
  return to_config_dict(cls())


def _config_path(name: str) -> str:
  """Returns the path of a config file, which may be named without folder and suffix, as 'tiny'.

  Raises:
    ConfigError: there is no such file.
  """
  known = {path.stem: path for path in sorted(NAMED_CONFIGS.glob('*.py'))}
  if Path(name).is_file():
    return name
  if name in known:
    return str(known[name])
  near = difflib.get_close_matches(Path(name).stem, known, n=1)
  guess = f'did you mean --config={near[0]}? ' if near else ''
  raise ConfigError(f'No such file; {guess}give the path of one, or {" or ".join(known)}')


def _with_values(args: list[str], config: ConfigDict) -> list[str]:
  """Returns the arguments, `--name value` made `--name=value`.

  Not where the name is a field that is true or false, which needs no value.
  """
  switches = {f'--config.{path}' for path, value in walk_fields(config) if type(value) is bool}
  joined: list[str] = []
  takes_value = False
  for arg in args:
    is_flag = arg.startswith('--')
    if takes_value and not is_flag:
      joined[-1] += f'={arg}'
    else:
      joined.append(arg)
    is_switch = arg in switches or arg.startswith('--noconfig.')
    takes_value = is_flag and '=' not in arg and not is_switch
  return joined


def _check_variant(get_config: Callable[..., object], path: str, variant: str) -> None:
  """ConfigError where the Literal of get_config's parameter does not list the variant.

  Where the parameter is any text, get_config itself decides.
  """
  parameters = [*inspect.signature(get_config, eval_str=True).parameters.values()]
  # No parameter: no variant but ''. get_args of an annotation that is not a Literal is ().
  variants = get_args(parameters[0].annotation) if parameters else ('',)
  if variants and variant not in variants:
    files = ' or '.join(f'{path}:{name}'.rstrip(':') for name in variants)
    raise ConfigError(f'it has no variant {variant!r}; use {files}')


def _override(config: ConfigDict, arg: str, names: list[str]) -> list[str]:
  """Sets one field through ml_collections' flag for its type, and returns what is wrong with it.

  One argument at a time: the parser of several would end at the first error.
  """
  name = arg.partition('=')[0].partition('.')[2]
  *path, field = name.split('.')
  section: object = config
  for part in path:
    is_known = isinstance(section, ConfigDict) and part in section
    section = section[part] if is_known else None
  # to_config_dict leaves tables, and nothing else, unlocked.
  is_section = isinstance(section, ConfigDict)
  is_table = is_section and not section.is_locked
  # What lies below a field that holds a value is no section, and has no fields.
  is_field = is_section and field in section
  if not (is_table or is_field):
    return [f'--config.{name}: no such field; {_nearest(name, names, arg.partition("=")[2])}']
  old = section[field] if is_field else 0.0
  if is_table and is_field:
    # The flag would insist on the old entry's type, and a schedule may replace a number.
    del section[field]
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


def _unknown_flag(arg: str, names: list[str]) -> str:
  """Returns the problem of an argument that is no flag of ours."""
  name, _, value = arg.lstrip('-').partition('=')
  return f'{arg}: no such flag; {_nearest(name, names, value)}'


def _initials(name: str) -> str:
  """Returns the first letters of the words of a name: 'learning_rate' -> 'lr'."""
  words = name.split('_')
  return ''.join(word[:1] for word in words) if len(words) > 1 else ''


def _nearest(name: str, names: list[str], value: str = '') -> str:
  """Returns the remedy for a name that does not exist.

  The last part of the name decides, and the whole path among the fields that share it: whoever
  leaves the sections out is still understood.
  """
  last_parts = {path: path.rpartition('.')[2] for path in names}
  last_part = name.rpartition('.')[2].replace('-', '_')
  # Initials, such as lr; difflib would not find them.
  near_parts = [part for part in last_parts.values() if _initials(part) == last_part]
  near_parts = near_parts or difflib.get_close_matches(last_part, last_parts.values(), n=1)
  candidates = [path for path in names if last_parts[path] in near_parts]
  near = difflib.get_close_matches(name, candidates, n=1, cutoff=0)
  return f'did you mean --config.{near[0]}={value}?' if near else '--help lists all'
