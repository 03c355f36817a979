"""Text, dataclasses and flags: how a config is written, checked and overridden. Knows no model."""

from moejax.config.checks import ConfigError, check, frozendict, unknown
from moejax.config.config_dict import from_config_dict, to_config_dict

__all__ = ['ConfigError', 'check', 'from_config_dict', 'frozendict', 'to_config_dict', 'unknown']
