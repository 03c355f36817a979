"""Keys of config.json that say what layers there are: windows, dense layers, groups, experts."""

from collections.abc import Callable, Mapping

from moejax.config import check, problem_if
from moejax.families.schema.config_keys import Codec, Config, Fields, field, need
from moejax.model.config import ModelConfig
from moejax.model.layer_pattern import dense_and_pattern, period_of

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
    return {'attention.windows': each[: period_of(each)]}

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


def sparse_layers(step: str = 'decoder_sparse_step', only: str = 'mlp_only_layers') -> Codec:
  """Returns the row of the two keys that say which layers have experts (Qwen).

  Args:
    step: key of how many layers there are to one with experts, which is the last of them.
    only: key of a list of layers without experts, whatever the step says.
  """

  def read_layers(config: Config) -> Fields:
    layers = need(config, 'num_hidden_layers')
    every = need(config, step) if step in config else 1
    without = (config[only] if only in config else None) or []
    check(problem_if(not isinstance(without, list), f'{only}={without!r}: use a list of layers'))
    known = range(layers)
    strangers = [one for one in without if type(one) is not int or one not in known]
    remedy = f'use layers of num_hidden_layers={layers}, 0 to {layers - 1}'
    check(problem_if(strangers, f'{only}={without} names {strangers}: {remedy}'))
    has_experts = [(i + 1) % every == 0 and i not in without for i in known]
    said = f'{step}={every} and {only}={without}'
    remedy = f'leave one of num_hidden_layers={layers} at least'
    check(problem_if(True not in has_experts, f'{said} leave no layer experts: {remedy}'))
    dense, pattern = dense_and_pattern(has_experts)
    return {'num_dense_layers': dense, 'ffn_pattern': pattern}

  def write_layers(cfg: ModelConfig) -> Config:
    # Of all steps that no layer with experts lies beside, the one with the shortest list.
    dense_at = {}
    for every in range(1, cfg.num_layers + 1):
      on_step = [i for i in range(cfg.num_layers) if (i + 1) % every == 0]
      if sum(cfg.has_experts) == sum(cfg.has_experts[i] for i in on_step):
        dense_at[every] = [i for i in on_step if not cfg.has_experts[i]]
    shortest = min(dense_at, key=lambda every: len(dense_at[every]))
    return {step: shortest, only: dense_at[shortest]}

  return Codec(read_layers, write_layers)


def shared_width(
  name: str = 'shared_expert_intermediate_size', routed: str = 'moe_intermediate_size'
) -> Codec:
  """Returns the row of the width of all shared experts, which are one FFN in files.

  Args:
    name: of the key.
    routed: the key that is the width of a routed expert.
  """

  def read_width(config: Config) -> Fields:
    number, own = count_shared(need(config, name), need(config, routed))
    return {'moe.num_shared': number, 'moe.d_shared': own}

  return Codec(read_width, lambda cfg: {name: cfg.moe.shared_width})


def count_shared(width: int, d_expert: int) -> tuple[int, int]:
  """Returns `num_shared` and `d_shared` of shared experts that are so wide together.

  They are so many of the width of a routed one, or, where that does not divide it, a single one.
  """
  return (1, width) if width % d_expert else (width // d_expert, 0)


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
