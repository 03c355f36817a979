"""The published families: model_type -> Family, and config.json to our config and back.

A new one is a file with a Family, and its row here.
"""

from moejax.config import ConfigError
from moejax.families.deepseek_v2 import DEEPSEEK_V2
from moejax.families.deepseek_v3 import DEEPSEEK_V3
from moejax.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from moejax.families.glm4_moe import GLM4_MOE
from moejax.families.gpt_oss import GPT_OSS
from moejax.families.mixtral import MIXTRAL
from moejax.families.olmoe import OLMOE
from moejax.families.openpangu_ultra_moe import OPENPANGU_ULTRA_MOE
from moejax.families.qwen2_moe import QWEN2_MOE
from moejax.families.qwen3_moe import QWEN3_MOE
from moejax.families.schema.config_keys import Config
from moejax.families.schema.family import Family, config_from_json, config_to_json
from moejax.model.config import ModelConfig

# model_type in config.json -> what is known of it
FAMILIES: dict[str, Family] = {
  known.model_type: known
  for known in (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMOE,
    OPENPANGU_ULTRA_MOE,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
  )
}


def family_of(config: Config) -> Family:
  """Returns the family of a config.json.

  Raises:
    ConfigError: its model_type is not known here.
  """
  kind = config['model_type'] if 'model_type' in config else None
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ConfigError(
      f'config.json: model_type={kind!r} is not known here: use one of {sorted(FAMILIES)}'
    )
  return FAMILIES[kind]


def model_config(config: Config) -> tuple[Family, ModelConfig]:
  """Returns the family of a config.json, and what it says as our config.

  Raises:
    ConfigError: tells all that is wrong with it.
  """
  known = family_of(config)
  return known, config_from_json(known, config)


def config_json(known: Family, cfg: ModelConfig, kept: Config) -> dict[str, object]:
  """Returns the config.json of a model, as transformers loads it.

  Args:
    known: the family whose files it is for.
    cfg: the model.
    kept: keys that no config of ours has, such as those of KEPT that an import found.

  Raises:
    ConfigError: files of the family cannot hold the model.
  """
  return config_to_json(known, cfg, kept)
