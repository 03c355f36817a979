"""Which layers slide, as config.json says it."""

import pytest

from moejax.families import FAMILIES, config_json
from tests.families.tiny_configs import read, tiny

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
