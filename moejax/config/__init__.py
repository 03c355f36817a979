"""Text, dataclasses and flags: how a config is written, checked and overridden. Knows no model."""

from moejax.config.checks import (
  INT32,
  LARGEST_SEED,
  ConfigError,
  above_zero,
  at_least,
  at_most,
  check,
  frozendict,
  local_path,
  not_finite,
  not_one_of,
  problem_if,
  unknown,
  url_problem,
  utf8_problem,
)
from moejax.config.config_dict import from_config_dict, to_config_dict

__all__ = [
  'INT32',
  'LARGEST_SEED',
  'ConfigError',
  'above_zero',
  'at_least',
  'at_most',
  'check',
  'from_config_dict',
  'frozendict',
  'local_path',
  'not_finite',
  'not_one_of',
  'problem_if',
  'to_config_dict',
  'unknown',
  'url_problem',
  'utf8_problem',
]
