"""How config.json speaks of rope: in the spelling of transformers 5, and in the hub's older one."""

from collections.abc import Mapping

from moejax.config import ConfigError, check, problem_if
from moejax.families.schema.config_keys import Codec, Config, Fields, need
from moejax.model.config import ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig

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


# Written even where they have YarnConfig's defaults, as the hub's files have them.
_ALWAYS = ('factor', 'original_length', 'beta_fast', 'beta_slow')
_TABLES = ('rope_parameters', 'rope_scaling')  # in transformers 5, and before it
_OUTSIDE = ('rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings')


def rope(
  theta: float = 1e4, fraction: float = 0.0, softmax_scaled: bool = False, **scaling: object
) -> Codec:
  """Returns the row of rope.

  Args:
    theta: without rope_theta.
    fraction: without partial_rotary_factor; 0: the family rotates whole heads only.
    softmax_scaled: mscale_all_dim scales the softmax too.
    scaling: what holds without rope_scaling and rope_parameters.
  """

  def read_rope(config: Config) -> Fields:
    said = {'rope_theta': theta, 'rope_type': 'default', 'partial_rotary_factor': fraction or 1.0}
    if not _tables(config):
      said |= scaling
    said |= _rope_said(config)
    kind, part = said['rope_type'], said['partial_rotary_factor']
    mscale = said['mscale_all_dim'] if 'mscale_all_dim' in said else None
    check(
      problem_if(
        kind not in ('default', 'yarn'),
        f"rope_type={kind!r} is not built here: use weights whose rope is 'default' or 'yarn'",
      ),
      problem_if(
        part != 1 and not fraction,
        f'partial_rotary_factor={part!r}: this family rotates whole heads; leave it out',
      ),
      problem_if(
        mscale and not softmax_scaled,
        f'mscale_all_dim={mscale!r} scales the softmax in latent attention only: leave it out',
      ),
    )
    # Fields of yarn that are not said have their defaults, whatever the family's base has.
    yarn = vars(YarnConfig()) | (_read_yarn(config, said) if kind == 'yarn' else {})
    fields = {'attention.rope.theta': said['rope_theta'], 'attention.rope.fraction': part}
    return fields | {f'attention.rope.yarn.{name}': value for name, value in yarn.items()}

  def write_rope(cfg: ModelConfig) -> Config:
    ours = cfg.attention.rope
    # A family that has yarn without saying so must be told that there is none.
    off = {'type': 'default', 'rope_type': 'default'} if scaling else None
    scaled = _write_yarn(ours) if ours.yarn.factor > 1 else off
    part = {'partial_rotary_factor': ours.fraction} if fraction else {}
    return {'rope_theta': ours.theta, 'rope_scaling': scaled} | part

  return Codec(read_rope, write_rope)


def _tables(config: Config) -> list[object]:
  """The tables of rope that config.json has, in either spelling."""
  return [config[name] for name in _TABLES if name in config and config[name]]


def _rope_said(config: Config) -> dict[str, object]:
  """All that is said of rope: in `rope_parameters`, in the older `rope_scaling`, or beside them."""
  said: dict[str, object] = {}
  beside = {name: config[name] for name in _OUTSIDE if name in config}
  for table in (beside, *_tables(config)):
    is_table = isinstance(table, Mapping)
    if not is_table or any(isinstance(value, Mapping) for value in table.values()):
      raise ConfigError(
        f'rope_parameters={table!r}: use one table for all layers; others are not built here'
      )
    for key, value in table.items():
      if value is None:
        continue
      name = 'rope_type' if key == 'type' else key
      if name in said and said[name] != value:
        pair = f'{name}={said[name]!r} and {name}={value!r}'
        raise ConfigError(f'{pair} are both said of rope: keep one')
      said[name] = value
  return said


def _read_yarn(config: Config, said: dict[str, object]) -> Fields:
  """Field of YarnConfig -> value, of all that is said of rope."""
  said = dict(said)
  if 'original_max_position_embeddings' not in said:
    said['original_max_position_embeddings'] = need(config, 'max_position_embeddings')
  if 'factor' not in said:
    longest = need(config, 'max_position_embeddings')
    said['factor'] = longest / need(said, 'original_max_position_embeddings')
  return {ours: said[theirs] for theirs, ours in _YARN.items() if theirs in said}


def _write_yarn(ours: RopeConfig) -> dict[str, object]:
  """The table of rope_scaling, under both names of its type."""
  table: dict[str, object] = {'type': 'yarn', 'rope_type': 'yarn'}
  plain = vars(YarnConfig())
  for theirs, name in _YARN.items():
    value = getattr(ours.yarn, name)
    if name in _ALWAYS or value != plain[name]:
      table[theirs] = value
  return table
