"""Text, dataclasses and flags: how a config is written, checked and overridden. Knows no model."""

from moejax.config.checks import (
  ConfigError,
  above_zero,
  at_least,
  check,
  frozendict,
  not_finite,
  not_one_of,
  problem_if,
  unknown,
  url_problem,
)
from moejax.config.config_dict import from_config_dict, to_config_dict

__all__ = [
  'ConfigError',
  'above_zero',
  'at_least',
  'check',
  'from_config_dict',
  'frozendict',
  'not_finite',
  'not_one_of',
  'problem_if',
  'to_config_dict',
  'unknown',
  'url_problem',
]
