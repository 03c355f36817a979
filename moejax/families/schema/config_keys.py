"""The rows of a family's table of keys: how config.json says what our config's fields say, and back.

A row reads config.json to {dotted field: value} and writes a config to {key: value}; what is wrong is a ConfigError.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moejax.config import check
from moejax.model.config import ModelConfig

Config = Mapping[str, object]  # config.json
Fields = dict[str, object]  # dotted path of a field of ModelConfig -> value
NOTHING = object()


def field(cfg: object, path: str) -> object:
  """The value at a dotted path."""
  return functools.reduce(getattr, path.split('.'), cfg)


class Key(NamedTuple):
  """A key of config.json that is one field, and how it is read and written.

  required: an absent key is an error; otherwise it leaves the family's base.
  empty: what null means, and an absent key unless it is required: a value, or a function of config.json.
  """

  name: str
  field: str
  required: bool = False
  empty: object = NOTHING

  def read(self, config: Config) -> Fields:
    """The field, or nothing."""
    is_said = self.required or self.name in config
    value = said(config, self.name) if is_said else None
    check(
      f'{self.name}=null: give a value'
      if is_said and value is None and self.empty is NOTHING
      else ''
    )
    if value is None:
      value = self.empty(config) if callable(self.empty) else self.empty
    return {} if value is NOTHING else {self.field: value}

  def write(self, cfg: ModelConfig) -> Config:
    """The key; null for what is off."""
    value = field(cfg, self.field)
    is_off = not callable(self.empty) and type(value) is type(self.empty) and value == self.empty
    return {self.name: None if is_off else value}


class Fixed(NamedTuple):
  """A key with one value that is built here, whether it is said or not."""

  name: str
  value: object
  remedy: str = 'no other is built here'
  required: bool = False

  def read(self, config: Config) -> Fields:
    """Nothing, but it objects to any other value."""
    check(
      f'{self.name} is missing: {self.remedy}' if self.required and self.name not in config else '',
      f'{self.name}={config[self.name]!r}: use {self.value!r}; {self.remedy}'
      if self.name in config and config[self.name] != self.value
      else '',
    )
    return {}

  def write(self, cfg: ModelConfig) -> Config:
    """The value."""
    return {self.name: self.value}


class Codec(NamedTuple):
  """Keys that say together, or in their own way, what some fields are."""

  read: Callable[[Config], Fields]
  write: Callable[[ModelConfig], Config]


def said(config: Config, name: str) -> object:
  """What the key says; ConfigError where it is missing."""
  check(
    f'{name} is missing: copy it from the config.json that came with the weights'
    if name not in config
    else ''
  )
  return config[name]


def need(config: Config, name: str) -> int:
  """A whole number that other keys are counted by."""
  number = said(config, name)
  check(
    f'{name}={number!r}: use a whole number, 1 or more'
    if type(number) is not int or number < 1
    else ''
  )
  return number


def number_of_heads(config: Config) -> int:
  """What num_key_value_heads is where nobody says it."""
  return need(config, 'num_attention_heads')


def equal_heads(config: Config) -> int:
  """What head_dim is where nobody says it."""
  width, heads = need(config, 'hidden_size'), need(config, 'num_attention_heads')
  check(
    f'hidden_size={width} does not divide into num_attention_heads={heads}: give head_dim'
    if width % heads
    else ''
  )
  return width // heads
