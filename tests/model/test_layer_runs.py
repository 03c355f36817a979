"""Which layers one scan runs, and in which order the layers of several stacks lie."""

import numpy as np
import pytest

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.layer_runs import (
  STACKS,
  LayerKind,
  by_depth,
  layer_runs,
  repeated_runs,
  stack_layers,
)

# Layers by depth, m with experts and d without, in capitals those that slide -> the runs.
RUNS = {
  'mmmm': [('m', 4)],
  'dmmm': [('d', 1), ('m', 3)],
  'mMmM': [('mM', 2)],
  'DmMmM': [('D', 1), ('mM', 2)],
  'dmdmdm': [('dm', 3)],
  'dmdmd': [('d', 1), ('md', 2)],
  'dddmdm': [('d', 2), ('dm', 2)],
  'mmmmdmmm': [('m', 4), ('d', 1), ('m', 3)],
  'dMdmdMdm': [('dMdm', 2)],
  'mMdD': [('mMdD', 1)],
}


@pytest.mark.parametrize('layers', RUNS)
def test_runs_are_of_the_fewest_layers_to_compile(layers: str) -> None:
  kinds = [LayerKind(STACKS[layer in 'mM'], int(layer.isupper())) for layer in layers]
  letter_of = dict(zip(kinds, layers))
  runs = repeated_runs(kinds)
  assert [(''.join(letter_of[kind] for kind in turn), turns) for turn, turns in runs] == RUNS[
    layers
  ]


def test_what_is_compiled_does_not_grow_with_depth_where_layers_repeat() -> None:
  """Whether the pattern and the windows begin together or not."""
  for pattern in (('moe',), ('moe', 'dense'), ('moe', 'dense', 'dense')):
    compiled = []
    for layers in (20, 50, 98):
      attention = AttentionConfig(windows=(4, 0))
      cfg = ModelConfig(num_layers=layers, ffn_pattern=pattern, attention=attention)
      runs = layer_runs(cfg)
      assert sum(len(run.turn) * run.turns for run in runs) == layers
      compiled.append(sum(len(run.turn) for run in runs))
    assert max(compiled) < 14, (pattern, compiled)


def test_stacks_hold_their_layers_by_depth_and_give_them_back() -> None:
  cfg = ModelConfig(num_layers=7, num_dense_layers=2, ffn_pattern=('moe', 'dense', 'moe'))
  stacks = stack_layers(cfg)
  assert stacks == {'dense_blocks': (0, 1, 3, 6), 'blocks': (2, 4, 5)}
  parts = {stack: 10.0 * np.array(layers) for stack, layers in stacks.items()}
  np.testing.assert_array_equal(by_depth(parts, cfg), 10.0 * np.arange(7))
  assert stack_layers(ModelConfig(num_layers=2)) == {'blocks': (0, 1)}
