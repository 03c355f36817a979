"""What a published family is: data that says how its config.json and its tensors are spelt, and nothing that runs.

config.json -> read(family, config) -> ModelConfig -> write(family, cfg) -> config.json
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from moejax.config import ConfigError, check, from_config_dict
from moejax.families.schema.config_keys import Codec, Config, Fields, Fixed, Key
from moejax.families.schema.tensor_names import Name
from moejax.model.config import ModelConfig
from moejax.model.field_roles import fields_with_role

# Keys that change nothing of what given weights compute, but that whoever trains on, samples or serves wants back.
KEPT = frozenset(
  {
    'attention_dropout',
    'aux_loss_alpha',
    'bos_token_id',
    'ep_size',
    'eos_token_id',
    'hidden_dropout',
    'max_position_embeddings',
    'output_router_logits',
    'pad_token_id',
    'router_aux_loss_coef',
    'router_jitter_noise',
    'seq_aux',
  }
)

# Keys of kin of these families, for what is not built here; 0, false or nothing is as good as absent.
UNBUILT = (
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'index_topk',
  'param_sink_number',
  'per_layer_config',
  'swa_layers',
  'use_mhc',
)


class Family(NamedTuple):
  """All that is known of a model_type.

  architecture: transformers' class.  base: what the family fixes, and what absent keys mean: a preset, where it can be.
  names: its name table.  presets: the published sizes, the first one 'full', and 'tiny' with every feature.
  aliases: other spellings of keys -> theirs here.
  """

  model_type: str
  architecture: str
  base: ModelConfig
  keys: tuple[Key | Fixed | Codec, ...]
  names: Mapping[str, Name]
  presets: Mapping[str, ModelConfig]
  aliases: Mapping[str, str] = {}


def renamed(family: Family, config: Config) -> Config:
  """The config with its aliases under the names that the family's keys have; ConfigError where both say something."""
  old = {name: family.aliases[name] for name in config if name in family.aliases}
  check(
    *(
      f'config.json: {name}={config[name]!r} and {old[name]}={config[old[name]]!r} are one thing: keep one'
      for name in old
      if old[name] in config and config[old[name]] != config[name]
    )
  )
  return {name: config[name] for name in config if name not in old} | {
    old[name]: config[name] for name in old
  }


def read_config(family: Family, config: Config) -> ModelConfig:
  """What config.json says, or a ConfigError of all that is wrong with it, in its own words."""
  config, tree, spelling = renamed(family, config), dataclasses.asdict(family.base), {}
  problems = [
    f'{name}={config[name]!r} is not built here'
    for name in UNBUILT
    if name in config and config[name]
  ]
  for key in family.keys:
    try:
      for path, value in key.read(config).items():
        *parents, leaf = path.split('.')
        functools.reduce(dict.__getitem__, parents, tree)[leaf] = value
    except ConfigError as error:
      problems += error.problems
    spelling |= {key.field.split('.')[-1]: key.name} if isinstance(key, Key) else {}
  check(*dict.fromkeys(f'config.json: {problem}' for problem in problems))
  try:
    cfg = from_config_dict(ModelConfig, tree)
    check('vocab_size=0: use 1 or more' if not cfg.vocab_size else '')
    return cfg
  except ConfigError as error:
    spelt = [re.sub(r'^config(?:\.\w+)*[:.] ?', '', problem) for problem in error.problems]
    raise ConfigError(
      *(f'config.json: {_in_its_words(problem, spelling)}' for problem in spelt)
    ) from error


def _in_its_words(problem: str, spelling: Mapping[str, str]) -> str:
  """The problem with our names of fields replaced by those of keys."""
  return re.sub(
    r'\b\w+_\w+|\b\w+(?==)', lambda m: spelling[m[0]] if m[0] in spelling else m[0], problem
  )


def write_config(family: Family, cfg: ModelConfig, kept: Config) -> dict[str, object]:
  """config.json in the spelling that transformers 4 and 5 and vLLM load, with what an import kept of another one.

  Raises:
    ConfigError: read back, it would be another model: the family cannot hold this one.
  """
  config = dict(kept) | {'architectures': [family.architecture], 'model_type': family.model_type}
  for key in family.keys:
    config |= key.write(cfg)
  ours, back = _decisive(cfg), _decisive(read_config(family, config))
  check(
    *(
      f'config.model.{path}={ours[path]!r} cannot be said in a config.json of model_type={family.model_type!r}, '
      f'which would be read as {back[path]!r}: choose another family'
      for path in ours
      if ours[path] != back[path]
    )
  )
  return config


def _decisive(cfg: ModelConfig) -> Fields:
  """Dotted path -> value of every field that decides what given weights compute, as a file can say it."""
  fields = fields_with_role(cfg, 'function')
  windows = cfg.attention.windows
  fields['attention.windows'] = [windows[i % len(windows)] for i in range(cfg.num_layers)]
  if not cfg.num_dense_layers:
    fields['d_ff'] = 0  # no layer reads it
  return fields
