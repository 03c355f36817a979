"""Keys of config.json that say what layers there are: windows, dense layers, groups, experts."""

from collections.abc import Callable, Mapping, Sequence

from moejax.config import check, problem_if
from moejax.families.schema.config_keys import Codec, Config, Fields, field, need
from moejax.model.config import ModelConfig

# Which layers slide where layer_types does not say it: of the layer's number and max_window_layers.
RULES: dict[str, Callable[[int, int], bool]] = {
  'every': lambda layer, full: True,
  'alternate': lambda layer, full: layer % 2 == 0,  # gpt-oss
  # Qwen2-MoE, as transformers 5 has it.
  'alternate_first': lambda layer, full: layer % 2 == 0 and layer < full,
  'last': lambda layer, full: layer >= full,  # Qwen2, Qwen3
}


def windows(rule: str, width: int, switch: bool = False) -> Codec:
  """Returns the row of sliding windows.

  Args:
    rule: a row of RULES; layer_types is read and written but for 'every'.
    width: of the window without sliding_window; 0: off.
    switch: windows are off unless use_sliding_window says otherwise.
  """

  def read_windows(config: Config) -> Fields:
    layers = need(config, 'num_hidden_layers')
    size = config['sliding_window'] if 'sliding_window' in config else width or None
    is_switched_on = 'use_sliding_window' in config and bool(config['use_sliding_window'])
    is_on = size is not None and (is_switched_on or not switch)
    is_size = type(size) is int and size > 0
    # transformers takes 28 where max_window_layers is not said.
    full = config['max_window_layers'] if 'max_window_layers' in config else 28
    is_ambiguous = is_on and switch and rule == 'every' and 'max_window_layers' in config and full
    check(
      problem_if(
        is_ambiguous,
        f'max_window_layers={full!r} with use_sliding_window=True means other layers in other '
        'versions of transformers: leave it out for windows everywhere',
      ),
      problem_if(
        is_on and not is_size,
        f'sliding_window={size!r}: use null (off), or a whole number, 1 or more',
      ),
    )
    slides = [RULES[rule](layer, full) for layer in range(layers)]
    if rule != 'every' and 'layer_types' in config and config['layer_types'] is not None:
      slides = _sliding_layers(config['layer_types'], layers)
    each = [size if is_on and slide else 0 for slide in slides]
    return {'attention.windows': each[: _period(each)]}

  def write_windows(cfg: ModelConfig) -> Config:
    each = [cfg.attention.windows[i % len(cfg.attention.windows)] for i in range(cfg.num_layers)]
    largest = max(each)
    keys: dict[str, object] = {'sliding_window': largest or None}
    if switch:
      keys['use_sliding_window'] = largest > 0
    if rule != 'every' and (largest or not switch):
      keys['layer_types'] = ['sliding_attention' if w else 'full_attention' for w in each]
    return keys

  return Codec(read_windows, write_windows)


def _sliding_layers(kinds: object, layers: int) -> list[bool]:
  """What layer_types says: does each layer slide?"""
  is_list = isinstance(kinds, list)
  check(problem_if(not is_list, f'layer_types={kinds!r}: use a list with a word for each layer'))
  unknown = [kind for kind in kinds if kind not in ('full_attention', 'sliding_attention')]
  problems = [
    f'layer_types has {kind!r}: only full_attention and sliding_attention are built here'
    for kind in unknown
  ]
  count = f'layer_types names {len(kinds)} layers of num_hidden_layers={layers}: name each once'
  check(*dict.fromkeys(problems), problem_if(len(kinds) != layers, count))
  return [kind == 'sliding_attention' for kind in kinds]


def _period(each: Sequence[int]) -> int:
  """The fewest first items that give all when they are repeated."""
  period = 1
  while any(item != each[i % period] for i, item in enumerate(each)):
    period += 1
  return period


def choice(name: str, path: str, ours: Mapping[bool, object]) -> Codec:
  """Returns the row of a switch in config.json that is one of two values here.

  Args:
    name: of the key, which is off where it is not said.
    path: of our field.
    ours: the field's value where the switch is on, and where it is off.
  """

  def read_choice(config: Config) -> Fields:
    value = config[name] if name in config else False
    check(problem_if(not isinstance(value, bool), f'{name}={value!r}: use true or false'))
    return {path: ours[value]}

  return Codec(read_choice, lambda cfg: {name: field(cfg, path) == ours[True]})


def dense_layers(name: str = 'mlp_only_layers') -> Codec:
  """Returns the row of a list of the layers without experts; here those are the first ones."""

  def read_list(config: Config) -> Fields:
    layers = (config[name] if name in config else None) or []
    check(problem_if(not isinstance(layers, list), f'{name}={layers!r}: use a list of layers'))
    first = list(range(len(layers)))
    remedy = f'use the first layers, {first}; dense layers are not built elsewhere'
    check(problem_if({*layers} != {*first}, f'{name}={layers}: {remedy}'))
    return {'num_dense_layers': len(layers)}

  return Codec(read_list, lambda cfg: {name: list(range(cfg.num_dense_layers))})


def shared_width(
  name: str = 'shared_expert_intermediate_size', routed: str = 'moe_intermediate_size'
) -> Codec:
  """Returns the row of the width of all shared experts, which is counted in routed ones here.

  Args:
    name: of the key.
    routed: the key that is the width of a routed expert.
  """

  def read_width(config: Config) -> Fields:
    width, one = need(config, name), need(config, routed)
    remedy = 'no other width is built here'
    check(problem_if(width % one, f'{name}={width} is not a multiple of {routed}={one}: {remedy}'))
    return {'moe.num_shared': width // one}

  return Codec(read_width, lambda cfg: {name: cfg.moe.num_shared * cfg.moe.d_expert})


def groups_by_method() -> Codec:
  """Returns the row of DeepSeek-V2's topk_method: only 'group_limited_greedy' looks at groups."""
  names = {'n_group': 'moe.router.num_groups', 'topk_group': 'moe.router.top_groups'}

  def read_groups(config: Config) -> Fields:
    method = config['topk_method'] if 'topk_method' in config else 'greedy'
    is_known = method in ('greedy', 'group_limited_greedy')
    problem = f'topk_method={method!r}: use greedy or group_limited_greedy'
    check(problem_if(not is_known, problem))
    return {path: need(config, name) if method != 'greedy' else 1 for name, path in names.items()}

  def write_groups(cfg: ModelConfig) -> Config:
    method = 'group_limited_greedy' if cfg.moe.router.num_groups > 1 else 'greedy'
    return {name: field(cfg, path) for name, path in names.items()} | {'topk_method': method}

  return Codec(read_groups, write_groups)


def latent_width(name: str = 'qk_head_dim') -> Codec:
  """Returns the row of a sum that transformers writes down; it is checked, and gives no field."""

  def read_sum(config: Config) -> Fields:
    nope, rope = need(config, 'qk_nope_head_dim'), need(config, 'qk_rope_head_dim')
    if name in config:
      parts = f'qk_nope_head_dim={nope} + qk_rope_head_dim={rope}'
      problem = f'{name}={config[name]} is not {parts}: leave it out'
      check(problem_if(config[name] != nope + rope, problem))
    return {}

  return Codec(read_sum, lambda cfg: {})
