"""Which layers slide or have experts, as config.json says it, and the width of shared experts."""

import dataclasses

import pytest

from moejax.families import FAMILIES, config_json
from tests.families.tiny_configs import TINY, read, tiny

WINDOWS = [
  ('mixtral', {'sliding_window': None}, (0,)),
  ('mixtral', {'sliding_window': ...}, (0,)),
  ('mixtral', {'sliding_window': 5}, (5,)),
  ('mistral', {'sliding_window': ...}, (4096,)),
  ('mistral', {'sliding_window': None}, (0,)),
  ('qwen3_moe', {'use_sliding_window': False, 'sliding_window': 5}, (0,)),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': 5}, (5,)),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': None}, (0,)),
  ('gpt_oss', {'layer_types': ..., 'sliding_window': 3}, (3, 0)),
  ('gpt_oss', {'layer_types': ['full_attention'] * 4}, (0,)),
  (
    'gpt_oss',
    {'layer_types': ['full_attention'] * 3 + ['sliding_attention'], 'sliding_window': 3},
    (0, 0, 0, 3),
  ),
  ('gpt_oss', {'num_hidden_layers': 3, 'layer_types': ...}, (8, 0)),
  # transformers 5: every other layer below max_window_layers in Qwen2-MoE, all layers from it on in
  # Qwen2 and Qwen3
  (
    'qwen2_moe',
    {'layer_types': ..., 'num_hidden_layers': 5, 'max_window_layers': 3},
    (8, 0, 8, 0, 0),
  ),
  ('qwen2', {'layer_types': ..., 'num_hidden_layers': 4, 'max_window_layers': 3}, (0, 0, 0, 8)),
  ('qwen3', {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0}, (8,)),
]


@pytest.mark.parametrize(('kind', 'said', 'windows'), WINDOWS)
def test_which_layers_slide(kind: str, said: dict, windows: tuple[int, ...]) -> None:
  cfg = read(tiny(kind, **said))
  assert cfg.attention.windows == windows
  back = read(config_json(FAMILIES[kind], cfg, {}))
  every = [
    [w.attention.windows[i % len(w.attention.windows)] for i in range(cfg.num_layers)]
    for w in (cfg, back)
  ]
  assert every[0] == every[1]


# step, layers without experts whatever the step -> which of eight layers have experts
LAYERS = [
  (1, [], '11111111'),
  (1, [0], '01111111'),
  (1, [0, 1, 5], '00111011'),
  (2, [], '01010101'),
  (2, [1], '00010101'),
  (2, [5], '01010001'),
  (3, [], '00100100'),
  (5, [], '00001000'),
]


@pytest.mark.parametrize(('step', 'only', 'wanted'), LAYERS)
def test_which_layers_have_experts(step: int, only: list[int], wanted: str) -> None:
  keys = {'decoder_sparse_step': step, 'mlp_only_layers': only}
  cfg = read(tiny('qwen3_moe', num_hidden_layers=8, **keys))
  assert ''.join(str(int(has)) for has in cfg.has_experts) == wanted
  written = config_json(FAMILIES['qwen3_moe'], cfg, {})
  assert {name: written[name] for name in keys} == keys
  # What a longer step says already, a list may say again.
  idle = [layer for layer in range(8) if wanted[layer] == '0']
  longer = {'decoder_sparse_step': 1, 'mlp_only_layers': idle}
  assert read(tiny('qwen3_moe', num_hidden_layers=8, **longer)) == cfg


@pytest.mark.parametrize(('width', 'number', 'own'), [(20, 1, 0), (60, 3, 0), (27, 1, 27)])
def test_shared_experts_are_counted_by_width(width: int, number: int, own: int) -> None:
  """The tiny preset's routed experts are 20 wide."""
  cfg = read(tiny('qwen2_moe', shared_expert_intermediate_size=width))
  assert (cfg.moe.num_shared, cfg.moe.d_shared) == (number, own)
  written = config_json(FAMILIES['qwen2_moe'], cfg, {})
  assert written['shared_expert_intermediate_size'] == width


def test_shared_experts_of_a_width_of_their_own_are_said_by_families_that_count_them() -> None:
  """One that is as wide as two routed ones is two, wherever it is written."""
  moe = dataclasses.replace(TINY['deepseek_v2'].moe, num_shared=1)
  wide = dataclasses.replace(moe, d_shared=2 * moe.d_expert)
  two = dataclasses.replace(moe, num_shared=2)
  one_way, other_way = (
    config_json(FAMILIES['deepseek_v2'], dataclasses.replace(TINY['deepseek_v2'], moe=each), {})
    for each in (wide, two)
  )
  assert one_way == other_way and one_way['n_shared_experts'] == 2
