"""Experts made of a dense FFN compute the dense function in the beginning, and are refused where they could not."""

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.transformer import Transformer
from moejax.model.upcycle import (
  UpcycleConfig,
  granularity,
  moe_layers,
  not_dense,
  outcome,
  redrawn,
  upcycle,
  upcycle_problems,
)
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.tree import flatten
from tests.support.quick import QUICK

RNG = np.random.default_rng
B, S, V, D, F, L = 2, 8, 32, 16, 16, 2
TOKENS = RNG(0).integers(V, size=(B, S)).astype(np.int32)
BATCH = Batch(
  TOKENS,
  TOKENS,
  TOKENS >= 0,
  np.ones_like(TOKENS),
  np.tile(np.arange(S, dtype=np.int32), (B, 1)),
  np.zeros(B, np.int32),
)
SOURCE = ModelConfig(
  vocab_size=V,
  d_model=D,
  num_layers=L,
  d_ff=F,
  attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=8, qkv_bias=True, qk_norm='head'),
  moe=MoEConfig(RouterConfig(1, 1), DispatchConfig('dense_matmul'), d_expert=F),
)
KEY = jax.random.key(0)


def target(
  router: RouterConfig,
  d_expert: int,
  num_shared: int = 0,
  shared_gate: bool = False,
  **changes: object,
) -> ModelConfig:
  moe = dataclasses.replace(
    SOURCE.moe, router=router, d_expert=d_expert, num_shared=num_shared, shared_gate=shared_gate
  )
  return dataclasses.replace(SOURCE, moe=moe, **changes)


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """Of random numbers, far from symmetric; not as initialised, which would have to be compiled for each config."""

  def drawn(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = RNG(zlib.crc32(name.encode()))
    return (
      rng.uniform(0.5, 2, a.shape) if 'scale' in name else rng.normal(scale=0.5, size=a.shape)
    ).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(lambda: Transformer(KEY, cfg)))


@functools.partial(jax.jit, compiler_options=QUICK)
def logits(model: Transformer) -> jax.Array:
  router = jnp.zeros((model.cfg.num_moe_layers, model.cfg.moe.router.num_experts))
  return model.logits(model(BATCH, router).hidden)


make = jax.jit(upcycle, static_argnums=2, compiler_options=QUICK)


@functools.cache
def made(cfg: ModelConfig, source: ModelConfig = SOURCE, drop: float = 0.0) -> Transformer:
  assert not any([*not_dense(source), *upcycle_problems(source, cfg)])
  return make(model_of(source), model_of(cfg), UpcycleConfig(drop), KEY)


def assert_dense(
  cfg: ModelConfig, source: ModelConfig = SOURCE, zero_routers: bool = False
) -> None:
  model = made(cfg, source)
  if zero_routers:
    leaves = {
      path: 0 * leaf if path.endswith('moe/router') else leaf
      for path, leaf in flatten(model).items()
    }
    model = jax.tree.unflatten(jax.tree.structure(model), [*leaves.values()])
  want = logits(model_of(source))
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(logits(model), want, atol=1e-5, rtol=1e-5)


# What each router's weights of all experts add up to where its logits are zero, by hand.
ALL = {
  'softmax': (RouterConfig(8, 8), 1.0),
  'sigmoid, scaled': (RouterConfig(8, 8, score_fn='sigmoid', scale=2.5), 2.5),
  'softmax as it is': (RouterConfig(8, 8, renormalise=False, scale=3.0), 3.0),
  'sigmoid as it is': (RouterConfig(8, 8, renormalise=False, score_fn='sigmoid'), 4.0),
  'half of softmax as it is': (RouterConfig(8, 4, renormalise=False), 0.5),
  'softmax after the choice': (RouterConfig(8, 4, weigh='softmax'), 1.0),
}


def dense(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
  gate, up = x @ weights['gate'], x @ weights['up']
  return (gate / (1 + np.exp(-gate)) * up) @ weights['down']


WEIGHTS = {
  name: RNG(i).normal(size=(L, F, D) if name == 'down' else (L, D, F))
  for i, name in enumerate(('gate', 'up', 'down'))
}


@pytest.mark.parametrize(('name', 'g'), [*zip(ALL, itertools.cycle((2, 4, 1)))])
def test_the_weighted_sum_of_experts_is_the_dense_ffn(name: str, g: int) -> None:
  router, total = ALL[name]
  found = moe_layers(WEIGHTS, MoEConfig(router, d_expert=F // g), 0.0, KEY)
  x = RNG(9).normal(size=(5, D))
  for layer in range(L):
    experts = [
      {
        name: np.asarray(found[f'blocks/moe/experts/{name}'][layer, e], np.float64)
        for name in WEIGHTS
      }
      for e in range(router.top_k)
    ]
    want = dense({name: w[layer] for name, w in WEIGHTS.items()}, x)
    np.testing.assert_allclose(
      sum(total / router.top_k * dense(expert, x) for expert in experts), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
  ('experts', 'g'),
  [
    (8, 4),
    *(
      pytest.param(e, g, marks=pytest.mark.slow)
      for e in (4, 8)
      for g in (1, 2, 4)
      if (e, g) != (8, 4)
    ),
  ],
)
def test_all_experts_with_equal_weights_give_the_dense_logits(experts: int, g: int) -> None:
  assert_dense(target(RouterConfig(experts, experts, renormalise=False), F // g), zero_routers=True)


TIED = dataclasses.replace(
  SOURCE,
  tie_embeddings=True,
  num_dense_layers=1,
  moe=dataclasses.replace(SOURCE.moe, router=RouterConfig(1, 1, scale=2.0)),
)


def test_whole_copies_give_the_dense_logits_whatever_the_router_says() -> None:
  """Beside a dense layer, of which the source has none."""
  cfg = target(
    RouterConfig(8, 4, score_fn='sigmoid', scale=2.5, num_groups=2), 4, num_dense_layers=1
  )
  router = made(cfg).blocks.moe.router[...]
  assert np.ptp(router[..., :4], axis=-1).max() == np.ptp(router[..., 4:], axis=-1).max() == 0
  assert (
    np.ptp(router, axis=-1).min() > 0
    and np.isin(router, model_of(cfg).blocks.moe.router[...]).all()
  )
  assert_dense(cfg)


def test_shared_experts_dense_layers_and_other_heads_give_the_dense_logits() -> None:
  """From a tied model with a dense block and a scaled expert, to an untied one with the block elsewhere."""
  assert_dense(
    target(RouterConfig(6, 3, scale=3.0), 4, num_shared=1, shared_gate=True, mtp_depth=1), TIED
  )


def loss(model: Transformer) -> jax.Array:
  router = jnp.zeros((model.cfg.num_moe_layers, model.cfg.moe.router.num_experts))
  return jnp.square(model.logits(model(BATCH, router).hidden)).mean()


@pytest.mark.slow
def test_equal_experts_take_different_steps() -> None:
  model = made(target(RouterConfig(4, 2), F))
  down = np.asarray(model.blocks.moe.experts.down[...])
  np.testing.assert_array_equal(down, np.broadcast_to(down[:, :1], down.shape))
  grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(model)
  for path, leaf in flatten(grads).items():
    assert np.abs(leaf).max() > 0, path
  for name in WEIGHTS:
    of = np.asarray(getattr(grads.blocks.moe.experts, name)[...])
    assert all(
      np.abs(of[:, a] - of[:, b]).max() > 1e-6 for a, b in itertools.combinations(range(4), 2)
    ), name


def test_dropped_units_are_drawn_anew_with_the_statistics_of_what_they_replace() -> None:
  old = {
    name: RNG(i).normal(i, 0.1 + i, size=(64, 256)).astype(np.float32)
    for i, name in enumerate(WEIGHTS)
  }
  new = jax.jit(redrawn, static_argnums=1, compiler_options=QUICK)(old, 0.3, KEY)
  drawn = [(new[name] != old[name]).any(1) for name in WEIGHTS]
  assert all((which == drawn[0]).all() for which in drawn) and drawn[0].sum() == int(0.3 * 64)
  for i, name in enumerate(WEIGHTS):
    rows = np.asarray(new[name])[drawn[0]]
    assert (rows != old[name][drawn[0]]).all()
    np.testing.assert_allclose(rows.mean(), i, atol=0.06 * (0.1 + i))
    np.testing.assert_allclose(rows.std(), 0.1 + i, rtol=0.05)


def test_each_expert_drops_units_of_its_own() -> None:
  cfg = target(RouterConfig(4, 4), F // 2)
  plain, some = made(cfg).blocks.moe.experts.up[...], made(cfg, drop=0.5).blocks.moe.experts.up[...]
  kept = np.asarray((plain == some).all(2))  # [L, E, f]
  assert (kept.sum(-1) == F // 4).all() and len(
    {row.tobytes() for row in kept.reshape(-1, F // 2)}
  ) > 6
  assert (
    plain
    != make(model_of(SOURCE), model_of(cfg), UpcycleConfig(1.0), KEY).blocks.moe.experts.up[...]
  ).all()


def changed(**changes: object) -> ModelConfig:
  """The source with other fields of its MoE layers."""
  return dataclasses.replace(SOURCE, moe=dataclasses.replace(SOURCE.moe, **changes))


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (
      changed(router=RouterConfig(4, 2)),
      'num_experts=4: only a model of one expert is a dense one',
    ),
    (
      changed(router=RouterConfig(1, 1, score_fn='sigmoid', renormalise=False)),
      'the weight of its expert follows from',
    ),
    (changed(num_shared=1), 'moe.num_shared=1 is no part of a dense FFN'),
    (changed(expert_bias=True), 'moe.expert_bias=True is no part of a dense FFN'),
    (
      changed(activation='clamped_swiglu'),
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
    (target(E8, 8, num_shared=2), 'model.moe.num_shared=2 leaves nothing of the 2 parts'),
    (target(E8, 4, num_shared=1), 'model.moe.router.num_experts=8: use a multiple of 3'),
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
    '6 experts are 2 copies of 3 of 4 parts of its FFN, the rest is shared; 50% of their units are drawn anew; '
    'routers and multi-token prediction begin at random'
  )
  assert (
    outcome(SOURCE, target(E8, F), UpcycleConfig())
    == '8 experts are 8 copies of its FFN; routers begin at random'
  )


@pytest.mark.parametrize('drop', [-0.1, 1.1, float('nan')])
def test_a_drop_that_cannot_be_is_told(drop: float) -> None:
  with pytest.raises(ConfigError, match='use 0 .plain copies. to 1'):
    UpcycleConfig(drop)
