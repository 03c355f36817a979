"""What a published family is: data that says how its config.json and its tensors are spelt.

config.json -> config_from_json(family, config) -> ModelConfig -> config_to_json(...) -> config.json
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from moejax.config import ConfigError, check, from_config_dict, problem_if
from moejax.families.schema.config_keys import Codec, Config, Fields, Fixed, Key
from moejax.families.schema.layer_keys import count_shared
from moejax.families.schema.tensor_names import Name
from moejax.model.config import ModelConfig
from moejax.model.field_roles import fields_with_role

# Keys that change nothing of what given weights compute, but that whoever trains on, samples or
# serves wants back.
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

# Keys of kin of these families, for what is not built here; 0, false or nothing is as good as
# absent.
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
  """All that is known of a model_type."""

  model_type: str
  architecture: str  # transformers' class
  base: ModelConfig  # what the family fixes, and what absent keys mean: a preset, where it can be
  keys: tuple[Key | Fixed | Codec, ...]  # how config.json is spelt
  names: Mapping[str, Name]  # path of a parameter -> its name in published files
  presets: Mapping[str, ModelConfig]  # published sizes, 'full' first, and 'tiny' with every feature
  aliases: Mapping[str, str] = {}  # other spellings of keys -> those in `keys`


def resolve_aliases(family: Family, config: Config) -> Config:
  """Returns the config with its aliases under the names that the family's keys have.

  Raises:
    ConfigError: a key and its alias say different things.
  """
  aliases = {name: family.aliases[name] for name in config if name in family.aliases}
  problems: list[str] = []
  for alias, name in aliases.items():
    if name in config and config[name] != config[alias]:
      pair = f'{alias}={config[alias]!r} and {name}={config[name]!r}'
      problems.append(f'config.json: {pair} are one thing: keep one')
  check(*problems)
  result = {name: value for name, value in config.items() if name not in aliases}
  return result | {name: config[alias] for alias, name in aliases.items()}


def config_from_json(family: Family, config: Config) -> ModelConfig:
  """Returns what config.json says as our config.

  Raises:
    ConfigError: tells all that is wrong with it, in the words of config.json.
  """
  config, tree = resolve_aliases(family, config), dataclasses.asdict(family.base)
  problems = [
    f'{name}={config[name]!r} is not built here'
    for name in UNBUILT
    if name in config and config[name]
  ]
  spelling: dict[str, str] = {}  # our field -> the key that says it
  for key in family.keys:
    try:
      for path, value in key.read(config).items():
        *parents, leaf = path.split('.')
        functools.reduce(dict.__getitem__, parents, tree)[leaf] = value
    except ConfigError as error:
      problems += error.problems
    if isinstance(key, Key):
      spelling[key.field.split('.')[-1]] = key.name
  # Two rows may read the same key, and object to it in the same words.
  check(*dict.fromkeys(f'config.json: {problem}' for problem in problems))
  try:
    cfg = from_config_dict(ModelConfig, tree)
    check(problem_if(not cfg.vocab_size, 'vocab_size=0: use 1 or more'))
    return cfg
  except ConfigError as error:
    theirs = [f'config.json: {_in_its_words(problem, spelling)}' for problem in error.problems]
    raise ConfigError(*theirs) from error


def _in_its_words(problem: str, spelling: Mapping[str, str]) -> str:
  """The problem of our config with our names of fields replaced by those of keys."""
  without_path = re.sub(r'^config(?:\.\w+)*[:.] ?', '', problem)

  def key(field: re.Match) -> str:
    return spelling[field[0]] if field[0] in spelling else field[0]

  # A field is a word with an underscore, or one that has a value.
  return re.sub(r'\b\w+_\w+|\b\w+(?==)', key, without_path)


def config_to_json(family: Family, cfg: ModelConfig, kept: Config) -> dict[str, object]:
  """Returns config.json in the spelling that transformers 4 and 5 and vLLM load.

  Args:
    family: whose files it is for.
    cfg: the model.
    kept: what an import kept of another config.json.

  Raises:
    ConfigError: read back, it would be another model: the family cannot hold this one.
  """
  cfg = _shared_as_read(cfg)
  config = dict(kept) | {'architectures': [family.architecture], 'model_type': family.model_type}
  for key in family.keys:
    config |= key.write(cfg)
  ours, back = _decisive(cfg), _decisive(config_from_json(family, config))
  check(
    *(
      f'config.model.{path}={ours[path]!r} cannot be said in a config.json of '
      f'model_type={family.model_type!r}, which would be read as {back[path]!r}: '
      'choose another family'
      for path in ours
      if ours[path] != back[path]
    )
  )
  return config


def _shared_as_read(cfg: ModelConfig) -> ModelConfig:
  """The same model with its shared experts counted as reading their width would count them."""
  number, own = count_shared(cfg.moe.shared_width, cfg.moe.d_expert)
  moe = dataclasses.replace(cfg.moe, num_shared=number, d_shared=own)
  return dataclasses.replace(cfg, moe=moe)


def _decisive(cfg: ModelConfig) -> Fields:
  """Dotted path -> value of every field that decides what given weights compute."""
  fields = fields_with_role(cfg, 'function')
  windows = cfg.attention.windows
  # As a file says it: a window and an FFN for each layer, not the shortest period.
  fields['attention.windows'] = [windows[i % len(windows)] for i in range(cfg.num_layers)]
  fields['ffn_pattern'] = ['moe' if has else 'dense' for has in cfg.has_experts]
  if all(cfg.has_experts):
    fields['d_ff'] = 0  # no layer reads it
  return fields
