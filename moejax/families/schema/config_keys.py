"""The rows of a family's table of keys: how config.json says what the fields of our config say.

A row reads config.json to {dotted field: value} and writes a config to {key: value}; what is wrong
is a ConfigError.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moejax.config import check, problem_if
from moejax.model.config import ModelConfig

Config = Mapping[str, object]  # config.json
Fields = dict[str, object]  # dotted path of a field of ModelConfig -> value
ABSENT_KEY = object()


def field(cfg: object, path: str) -> object:
  """Returns the value at a dotted path of a config."""
  return functools.reduce(getattr, path.split('.'), cfg)


class Key(NamedTuple):
  """A key of config.json that is one field, and how it is read and written."""

  name: str  # of the key
  field: str  # dotted path of a field of ModelConfig
  required: bool = False  # an absent key is an error; otherwise it leaves the family's base
  # What null means, and an absent key unless it is required: a value, or a function of config.json.
  empty: object = ABSENT_KEY

  def read(self, config: Config) -> Fields:
    """Returns the field, or nothing where the family's base holds."""
    is_said = self.required or self.name in config
    value = said(config, self.name) if is_said else None
    is_null = is_said and value is None
    check(problem_if(is_null and self.empty is ABSENT_KEY, f'{self.name}=null: give a value'))
    if value is None:
      value = self.empty(config) if callable(self.empty) else self.empty
    return {} if value is ABSENT_KEY else {self.field: value}

  def write(self, cfg: ModelConfig) -> Config:
    """Returns the key; null for what is off."""
    value = field(cfg, self.field)
    # The type too: False is no 0.
    is_off = not callable(self.empty) and type(value) is type(self.empty) and value == self.empty
    return {self.name: None if is_off else value}


class Fixed(NamedTuple):
  """A key with one value that is built here, whether it is said or not."""

  name: str
  value: object
  remedy: str = 'no other is built here'
  required: bool = False

  def read(self, config: Config) -> Fields:
    """Returns no field, and objects to any other value."""
    if self.name in config:
      value = config[self.name]
      problem = f'{self.name}={value!r}: use {self.value!r}; {self.remedy}'
      check(problem_if(value != self.value, problem))
    else:
      check(problem_if(self.required, f'{self.name} is missing: {self.remedy}'))
    return {}

  def write(self, cfg: ModelConfig) -> Config:
    """Returns the key with its one value."""
    return {self.name: self.value}


class Codec(NamedTuple):
  """Keys that say together, or in their own way, what some fields are."""

  read: Callable[[Config], Fields]
  write: Callable[[ModelConfig], Config]


def said(config: Config, name: str) -> object:
  """Returns what the key says.

  Raises:
    ConfigError: it is missing.
  """
  remedy = 'copy it from the config.json that came with the weights'
  check(problem_if(name not in config, f'{name} is missing: {remedy}'))
  return config[name]


def need(config: Config, name: str) -> int:
  """Returns a whole number, 1 or more, that other keys are counted by; ConfigError of others."""
  number = said(config, name)
  is_count = type(number) is int and number >= 1  # a bool is an int, and no count
  check(problem_if(not is_count, f'{name}={number!r}: use a whole number, 1 or more'))
  return number


def number_of_heads(config: Config) -> int:
  """Returns what num_key_value_heads is where config.json does not say it."""
  return need(config, 'num_attention_heads')


def equal_heads(config: Config) -> int:
  """Returns what head_dim is where config.json does not say it."""
  width, heads = need(config, 'hidden_size'), need(config, 'num_attention_heads')
  problem = f'hidden_size={width} does not divide into num_attention_heads={heads}: give head_dim'
  check(problem_if(width % heads, problem))
  return width // heads
