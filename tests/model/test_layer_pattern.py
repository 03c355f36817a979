"""Which layers have experts: one way to say it, and what is refused."""

import dataclasses

import pytest

from moejax.config import ConfigError
from moejax.model.config import ModelConfig
from moejax.model.layer_pattern import dense_and_pattern, period_of


@pytest.mark.parametrize(
  ('pattern', 'told'),
  [
    ((), "use words 'moe' and 'dense'"),
    (('dense',), "and one 'moe' at least"),
    (('moe', 'mlp'), "ffn_pattern=('moe', 'mlp'): use words"),
    (
      ('dense', 'dense', 'moe'),
      "use ('moe', 'dense', 'dense'), and count the layers before it in num_dense_layers=3",
    ),
  ],
)
def test_a_pattern_that_cannot_be_is_one_clear_error(pattern: tuple[str, ...], told: str) -> None:
  with pytest.raises(ConfigError) as error:
    ModelConfig(num_layers=6, num_dense_layers=1, ffn_pattern=pattern)
  assert len(error.value.problems) == 1 and told in error.value.problems[0]


@pytest.mark.parametrize(
  ('layers', 'dense', 'pattern'),
  [
    ('mmmm', 0, ('moe',)),
    ('ddmm', 2, ('moe',)),
    ('dmdm', 1, ('moe', 'dense')),
    ('dmdmd', 1, ('moe', 'dense')),
    ('mmdm', 0, ('moe', 'moe', 'dense')),
    ('dddm', 3, ('moe',)),
  ],
)
def test_layers_are_said_in_one_way(layers: str, dense: int, pattern: tuple[str, ...]) -> None:
  """By depth, m is a layer with experts, d one without."""
  has_experts = tuple(layer == 'm' for layer in layers)
  assert dense_and_pattern(has_experts) == (dense, pattern)
  cfg = ModelConfig(
    num_layers=len(layers), num_dense_layers=dense, ffn_pattern=pattern, mtp_depth=2
  )
  assert cfg.has_experts == has_experts and cfg.num_moe_layers == layers.count('m') + 2
  # A longer way to say the pattern is the same layers.
  assert dataclasses.replace(cfg, ffn_pattern=2 * pattern).has_experts == has_experts


def test_a_period_need_not_divide_what_it_repeats_in() -> None:
  assert [period_of(text) for text in ('aaaa', 'abab', 'ababa', 'aab', 'abaab')] == [1, 2, 2, 3, 3]
