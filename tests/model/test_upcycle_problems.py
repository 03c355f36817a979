"""What cannot be upcycled is refused in words, and what can be is described."""

import dataclasses
import itertools

import pytest

from moejax.config import ConfigError
from moejax.model.config import ModelConfig
from moejax.model.upcycle import (
  UpcycleConfig,
  granularity,
  not_dense,
  outcome,
  upcycle_problems,
)
from moejax.moe.routing import RouterConfig
from tests.model.upcycle_cases import SOURCE, F, target


def dense_with(**changes: object) -> ModelConfig:
  """The source with other fields of its MoE layers."""
  return dataclasses.replace(SOURCE, moe=dataclasses.replace(SOURCE.moe, **changes))


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (
      dense_with(router=RouterConfig(4, 2)),
      'num_experts=4: only a model of one expert is a dense one',
    ),
    (
      dense_with(router=RouterConfig(1, 1, score_fn='sigmoid', renormalise=False)),
      'the weight of its expert follows from',
    ),
    (dense_with(num_shared=1), 'moe.num_shared=1 is no part of a dense FFN'),
    (dense_with(expert_bias=True), 'moe.expert_bias=True is no part of a dense FFN'),
    (
      dense_with(activation='clamped_swiglu'),
      "moe.activation='clamped_swiglu' is no part of a dense FFN",
    ),
    (
      dataclasses.replace(SOURCE, num_dense_layers=1, d_ff=20),
      'd_ff=20 in its dense layers is not d_expert=16',
    ),
  ],
  ids=lambda x: '' if isinstance(x, ModelConfig) else x.split(':')[0][:30],
)
def test_what_is_not_dense_is_told(cfg: ModelConfig, told: str) -> None:
  problems = [problem for problem in not_dense(cfg) if problem]
  assert len(problems) == 1 and problems[0].startswith(told), problems


E8 = RouterConfig(8, 2)


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (target(E8, 6), 'model.moe.d_expert=6 does not divide the 16 hidden units'),
    (target(E8, 32), 'model.moe.d_expert=32 does not divide the 16 hidden units'),
    (
      target(E8, 8, num_shared=2),
      'model.moe.num_shared=2, 16 hidden units, leaves nothing of the 16',
    ),
    (target(E8, 4, num_shared=1), 'model.moe.router.num_experts=8: use a multiple of 3'),
    (
      target(E8, 4, num_shared=1, d_shared=7),
      'model.moe.d_expert=4 does not divide the 16 hidden units of the dense FFN, less the 7 of '
      'shared experts: use a divisor',
    ),
    (target(E8, 8, num_dense_layers=1, d_ff=20), 'model.d_ff=20: use 16'),
    (target(E8, 8, tie_embeddings=True), 'model.tie_embeddings=True: use False'),
    (
      dataclasses.replace(
        target(E8, 8), moe=dataclasses.replace(SOURCE.moe, router=E8, activation='clamped_swiglu')
      ),
      "model.moe.activation='clamped_swiglu': use 'swiglu'",
    ),
    *(
      (target(E8, 8, **other), 'it has other shapes')
      for other in (
        {'d_model': 32},
        {'num_layers': 3},
        {'vocab_size': 64},
        {'sandwich_norm': True},
        {'attention': dataclasses.replace(SOURCE.attention, qk_norm='')},
        {'attention': dataclasses.replace(SOURCE.attention, out_bias=True)},
      )
    ),
  ],
  ids=itertools.count(),
)
def test_what_the_source_cannot_become_is_told(cfg: ModelConfig, told: str) -> None:
  problems = [problem for problem in upcycle_problems(SOURCE, cfg) if problem]
  assert len(problems) == 1 and problems[0].startswith(told), problems


def test_what_was_done_is_said() -> None:
  cfg = target(RouterConfig(6, 3), 4, num_shared=1, mtp_depth=1)
  assert granularity(SOURCE, cfg) == 3
  assert outcome(SOURCE, cfg, UpcycleConfig(0.5)) == (
    '6 experts are 2 copies of 3 of 4 parts of its FFN, the rest is shared; '
    '50% of their units are drawn anew; '
    'routers and multi-token prediction begin at random'
  )
  odd = outcome(SOURCE, target(RouterConfig(6, 3), 3, num_shared=1, d_shared=7), UpcycleConfig())
  assert odd == (
    '6 experts are 2 copies of its FFN in 3 parts, beside 7 units that are shared; '
    'routers begin at random'
  )
  plain = outcome(SOURCE, target(E8, F), UpcycleConfig())
  halves = outcome(SOURCE, target(E8, F // 2), UpcycleConfig())
  assert halves == '8 experts are 4 copies of its FFN in 2 parts; routers begin at random'
  assert plain == '8 experts are 8 copies of its FFN; routers begin at random'


@pytest.mark.parametrize('drop', [-0.1, 1.1])
def test_a_drop_that_cannot_be_is_told(drop: float) -> None:
  with pytest.raises(ConfigError, match='use 0 .plain copies. to 1'):
    UpcycleConfig(drop)
