"""What a router config refuses."""

import pytest

from moejax.config import ConfigError
from moejax.moe.routing import RouterConfig


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'num_experts': 0}, 'num_experts=0'),
    ({'top_k': 0}, 'top_k=0'),
    ({'top_k': 9}, 'top_k=9'),
    ({'score_fn': 'relu'}, "score_fn='relu' is not one of"),
    ({'num_groups': 3}, 'num_groups=3'),
    ({'num_groups': 0}, 'num_groups=0'),
    ({'num_groups': 4, 'top_groups': 5}, 'top_groups=5'),
    ({'num_groups': 4, 'top_k': 3}, 'top_k=3'),
    ({'scale': 0.0}, 'scale=0.0'),
    ({'weigh': 'relu'}, "weigh='relu' is not one of ['scores', 'softmax']"),
    ({'selection': 'best'}, "selection='best' is not one of ['expert_choice', "),
    (
      {'weigh': 'softmax', 'renormalise': False},
      "weigh='softmax' always adds up to 1: use renormalise=True",
    ),
    ({'group_best': 0}, 'group_best=0: use 1 ('),
    ({'jitter': 1.0}, 'jitter=1.0: use 0 (off)'),
    ({'jitter': -0.1}, 'jitter=-0.1: use 0 (off)'),
    (
      {'noisy': True, 'top_k': 8},
      'noisy=True needs an expert that is not chosen: use top_k below num_experts=8',
    ),
    (
      {'expert_dropout': 0.8},
      'expert_dropout=0.8 leaves 2 of num_experts=8: use 0 (off), or what leaves top_k=3 to 7',
    ),
    ({'expert_dropout': 1.5}, 'expert_dropout=1.5 leaves -4 of num_experts=8: use 0 (off)'),
    ({'expert_dropout': -0.1}, 'expert_dropout=-0.1 leaves 9 of num_experts=8: use 0 (off)'),
    ({'expert_dropout': 0.01}, 'expert_dropout=0.01 leaves 8 of num_experts=8: use 0 (off)'),
    (
      {'expert_dropout': 0.25, 'num_groups': 2, 'top_groups': 2},
      'expert_dropout=0.25 with num_groups=2 can empty',
    ),
    (
      {'random_second': True},
      'random_second=True is for two experts per token, not top_k=3: use top_k=2',
    ),
    (
      {'selection': 'hash', 'num_groups': 2, 'top_groups': 2},
      "num_groups=2 is about a choice that selection='hash'",
    ),
    (
      {'selection': 'uniform', 'expert_dropout': 0.25},
      'expert_dropout=0.25 is about a choice that',
    ),
    (
      {'selection': 'sinkhorn', 'noisy': True},
      "noisy=True is about a choice that selection='sinkhorn'",
    ),
    (
      {'selection': 'expert_choice', 'random_second': True, 'top_k': 2},
      'random_second=True is about a choice that',
    ),
  ],
)
def test_a_router_that_cannot_be_is_one_clear_error(
  fields: dict[str, int | str | float], named: str
) -> None:
  with pytest.raises(ConfigError) as error:
    RouterConfig(**{'top_k': 3 if 'num_groups' not in fields else 2, **fields})
  assert error.value.problems[0].startswith(named)
  assert any(
    remedy in error.value.problems[0] for remedy in ('use ', 'is not one of', 'raise top_groups')
  )


def test_all_problems_of_a_router_come_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    RouterConfig(num_experts=8, top_k=9, score_fn='relu', num_groups=3, scale=-1.0)
  assert len(error.value.problems) == 4
