"""The tiny presets of all families, and their config.json with other keys."""

import dataclasses
from typing import TypeVar

from moejax.families import FAMILIES, config_json, model_config
from moejax.families.schema.tensor_names import leaves, tensors
from moejax.model.config import ModelConfig

T = TypeVar('T')
TINY = {kind: known.presets['tiny'] for kind, known in FAMILIES.items()}


def tiny(kind: str, **changes: object) -> dict:
  """config.json of the tiny preset, with other keys; a key that is to be ... is not there."""
  config = config_json(FAMILIES[kind], TINY[kind], {'max_position_embeddings': 512}) | changes
  return {name: value for name, value in config.items() if value is not ...}


def read(config: dict) -> ModelConfig:
  return model_config(config)[1]


def made_of(kind: str, cfg: ModelConfig, **config: object) -> dict:
  known = FAMILIES[kind]
  return tensors(known.names, cfg, config_json(known, cfg, config), leaves(cfg))


def changed(cfg: T, path: str, value: object) -> T:
  """A config with another value at a dotted path."""
  name, _, rest = path.partition('.')
  inner = changed(getattr(cfg, name), rest, value) if rest else value
  return dataclasses.replace(cfg, **{name: inner})
