"""How config.json speaks of rope: in the spelling of transformers 5, and in the one before it, which the hub has."""

from collections.abc import Mapping

from moejax.config import ConfigError, check
from moejax.families.schema.config_keys import Codec, Config, Fields, need
from moejax.model.config import ModelConfig
from moejax.model.rope import YarnConfig

# As rope_scaling spells it -> our field.
_YARN = {
  'factor': 'factor',
  'original_max_position_embeddings': 'original_length',
  'beta_fast': 'beta_fast',
  'beta_slow': 'beta_slow',
  'mscale': 'mscale',
  'mscale_all_dim': 'mscale_all_dim',
  'attention_factor': 'attention_factor',
  'truncate': 'truncate',
}


def _rope_said(config: Config) -> dict[str, object]:
  """All that is said of rope: in `rope_parameters`, in the older `rope_scaling`, or beside them."""
  said: dict[str, object] = {}
  outside = ('rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings')
  tables = [
    config[name] for name in ('rope_parameters', 'rope_scaling') if name in config and config[name]
  ]
  for table in ({name: config[name] for name in outside if name in config}, *tables):
    if not isinstance(table, Mapping) or any(
      isinstance(value, Mapping) for value in table.values()
    ):
      raise ConfigError(
        f'rope_parameters={table!r}: use one table for all layers; others are not built here'
      )
    for name, value in table.items():
      name = 'rope_type' if name == 'type' else name
      check(
        f'{name}={said[name]!r} and {name}={value!r} are both said of rope: keep one'
        if name in said and value is not None and said[name] != value
        else ''
      )
      said |= {} if value is None else {name: value}
  return said


def rope(
  theta: float = 1e4, fraction: float = 0.0, softmax_scaled: bool = False, **scaling: object
) -> Codec:
  """theta: without rope_theta.  fraction: without partial_rotary_factor; 0: the family rotates whole heads only.
  softmax_scaled: mscale_all_dim scales the softmax too.  scaling: without rope_scaling and rope_parameters."""

  def read_rope(config: Config) -> Fields:
    said = _rope_said(config)
    tables = [
      name for name in ('rope_parameters', 'rope_scaling') if name in config and config[name]
    ]
    said = (
      {'rope_theta': theta, 'rope_type': 'default', 'partial_rotary_factor': fraction or 1.0}
      | ({} if tables else scaling)
      | said
    )
    kind, part = said['rope_type'], said['partial_rotary_factor']
    check(
      f"rope_type={kind!r} is not built here: use weights whose rope is 'default' or 'yarn'"
      if kind not in ('default', 'yarn')
      else '',
      f'partial_rotary_factor={part!r}: this family rotates whole heads; leave it out'
      if part != 1 and not fraction
      else '',
      f'mscale_all_dim={said["mscale_all_dim"]!r} scales the softmax in latent attention only: leave it out'
      if not softmax_scaled and 'mscale_all_dim' in said and said['mscale_all_dim']
      else '',
    )
    fields = {'attention.rope.theta': said['rope_theta'], 'attention.rope.fraction': part}
    fields |= {f'attention.rope.yarn.{name}': value for name, value in vars(YarnConfig()).items()}
    if kind == 'yarn':
      if 'original_max_position_embeddings' not in said:
        said['original_max_position_embeddings'] = need(config, 'max_position_embeddings')
      if 'factor' not in said:
        said['factor'] = need(config, 'max_position_embeddings') / need(
          said, 'original_max_position_embeddings'
        )
      fields |= {
        f'attention.rope.yarn.{ours}': said[theirs]
        for theirs, ours in _YARN.items()
        if theirs in said
      }
    return fields

  def write_rope(cfg: ModelConfig) -> Config:
    ours, plain = cfg.attention.rope, vars(YarnConfig())
    off = {'type': 'default', 'rope_type': 'default'} if scaling else None
    always = ('factor', 'original_length', 'beta_fast', 'beta_slow')
    yarn = {'type': 'yarn', 'rope_type': 'yarn'} | {
      theirs: getattr(ours.yarn, name)
      for theirs, name in _YARN.items()
      if name in always or getattr(ours.yarn, name) != plain[name]
    }
    part = {'partial_rotary_factor': ours.fraction} if fraction else {}
    return {'rope_theta': ours.theta, 'rope_scaling': yarn if ours.yarn.factor > 1 else off} | part

  return Codec(read_rope, write_rope)
