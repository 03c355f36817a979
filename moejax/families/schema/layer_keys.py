"""Keys of config.json that say what layers there are: sliding windows, dense layers, groups, shared experts, norms."""

from collections.abc import Callable, Mapping

from moejax.config import check
from moejax.families.schema.config_keys import Codec, Config, Fields, field, need
from moejax.model.config import ModelConfig

# Which layers slide where layer_types does not say it: of the layer's number and max_window_layers.
RULES: dict[str, Callable[[int, int], bool]] = {
  'every': lambda layer, full: True,
  'alternate': lambda layer, full: layer % 2 == 0,  # gpt-oss
  'alternate_first': lambda layer, full: (
    layer % 2 == 0 and layer < full
  ),  # Qwen2-MoE, as transformers 5 has it
  'last': lambda layer, full: layer >= full,  # Qwen2, Qwen3
}


def windows(rule: str, width: int, switch: bool = False) -> Codec:
  """rule: a row of RULES; layer_types is read and written but for 'every'.  width: without sliding_window; 0: off.
  switch: windows are off unless use_sliding_window says otherwise."""

  def read_windows(config: Config) -> Fields:
    layers = need(config, 'num_hidden_layers')
    size = config['sliding_window'] if 'sliding_window' in config else width or None
    is_on = size is not None and (
      not switch or 'use_sliding_window' in config and bool(config['use_sliding_window'])
    )
    full = config['max_window_layers'] if 'max_window_layers' in config else 28
    check(
      f'max_window_layers={full!r} with use_sliding_window=True means other layers in other versions of '
      'transformers: leave it out for windows everywhere'
      if is_on and switch and rule == 'every' and 'max_window_layers' in config and full
      else '',
      f'sliding_window={size!r}: use null (off), or a whole number, 1 or more'
      if is_on and not (type(size) is int and size > 0)
      else '',
    )
    slides = [RULES[rule](layer, full) for layer in range(layers)]
    if rule != 'every' and 'layer_types' in config and config['layer_types'] is not None:
      kinds = config['layer_types']
      check(
        f'layer_types={kinds!r}: use a list with a word for each layer'
        if not isinstance(kinds, list)
        else ''
      )
      check(
        *dict.fromkeys(
          f'layer_types has {kind!r}: only full_attention and sliding_attention are built here'
          for kind in kinds
          if kind not in ('full_attention', 'sliding_attention')
        ),
        f'layer_types names {len(kinds)} layers of num_hidden_layers={layers}: name each once'
        if len(kinds) != layers
        else '',
      )
      slides = [kind == 'sliding_attention' for kind in kinds]
    each = [size if is_on and slide else 0 for slide in slides]
    period = next(
      p for p in range(1, layers + 1) if all(w == each[i % p] for i, w in enumerate(each))
    )
    return {'attention.windows': each[:period]}

  def write_windows(cfg: ModelConfig) -> Config:
    each = [cfg.attention.windows[i % len(cfg.attention.windows)] for i in range(cfg.num_layers)]
    kinds = ['sliding_attention' if w else 'full_attention' for w in each]
    return (
      {'sliding_window': max(each) or None}
      | ({'use_sliding_window': max(each) > 0} if switch else {})
      | ({'layer_types': kinds} if rule != 'every' and (max(each) or not switch) else {})
    )

  return Codec(read_windows, write_windows)


def choice(name: str, path: str, ours: Mapping[bool, object]) -> Codec:
  """A switch in config.json, one of two values here; off where it is not said."""

  def read_choice(config: Config) -> Fields:
    value = config[name] if name in config else False
    check(f'{name}={value!r}: use true or false' if not isinstance(value, bool) else '')
    return {path: ours[value]}

  return Codec(read_choice, lambda cfg: {name: field(cfg, path) == ours[True]})


def dense_layers(name: str = 'mlp_only_layers') -> Codec:
  """A list of the layers without experts; here those are the first ones."""

  def read_list(config: Config) -> Fields:
    layers = (config[name] if name in config else None) or []
    check(f'{name}={layers!r}: use a list of layers' if not isinstance(layers, list) else '')
    check(
      f'{name}={layers}: use the first layers, {list(range(len(layers)))}; dense layers are not built elsewhere'
      if {*layers} != {*range(len(layers))}
      else ''
    )
    return {'num_dense_layers': len(layers)}

  return Codec(read_list, lambda cfg: {name: list(range(cfg.num_dense_layers))})


def shared_width(
  name: str = 'shared_expert_intermediate_size', routed: str = 'moe_intermediate_size'
) -> Codec:
  """The width of all shared experts together, which here is counted in routed ones."""

  def read_width(config: Config) -> Fields:
    width, one = need(config, name), need(config, routed)
    check(
      f'{name}={width} is not a multiple of {routed}={one}: no other width is built here'
      if width % one
      else ''
    )
    return {'moe.num_shared': width // one}

  return Codec(read_width, lambda cfg: {name: cfg.moe.num_shared * cfg.moe.d_expert})


def groups_by_method() -> Codec:
  """DeepSeek-V2's topk_method: groups are looked at with 'group_limited_greedy' only."""
  names = {'n_group': 'moe.router.num_groups', 'topk_group': 'moe.router.top_groups'}

  def read_groups(config: Config) -> Fields:
    method = config['topk_method'] if 'topk_method' in config else 'greedy'
    check(
      f'topk_method={method!r}: use greedy or group_limited_greedy'
      if method not in ('greedy', 'group_limited_greedy')
      else ''
    )
    return {path: need(config, name) if method != 'greedy' else 1 for name, path in names.items()}

  return Codec(
    read_groups,
    lambda cfg: (
      {name: field(cfg, path) for name, path in names.items()}
      | {'topk_method': 'group_limited_greedy' if cfg.moe.router.num_groups > 1 else 'greedy'}
    ),
  )


def latent_width(name: str = 'qk_head_dim') -> Codec:
  """A sum that transformers writes down: it must be one."""

  def read_sum(config: Config) -> Fields:
    nope, rope = (need(config, part) for part in ('qk_nope_head_dim', 'qk_rope_head_dim'))
    check(
      f'{name}={config[name]} is not qk_nope_head_dim={nope} + qk_rope_head_dim={rope}: leave it out'
      if name in config and config[name] != nope + rope
      else ''
    )
    return {}

  return Codec(read_sum, lambda cfg: {})
