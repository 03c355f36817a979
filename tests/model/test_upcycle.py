"""Experts made of a dense FFN compute the dense function in the beginning."""

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.batch import Batch
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.model.upcycle import (
  UpcycleConfig,
  moe_layers,
  not_dense,
  redraw_units,
  upcycle,
  upcycle_problems,
)
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.tree import flatten
from tests.model.upcycle_cases import RNG, SOURCE, B, D, F, L, S, V, target
from tests.support.quick import QUICK

TOKENS = RNG(0).integers(V, size=(B, S)).astype(np.int32)
BATCH = Batch(
  TOKENS,
  TOKENS,
  TOKENS >= 0,
  np.ones_like(TOKENS),
  np.tile(np.arange(S, dtype=np.int32), (B, 1)),
  np.zeros(B, np.int32),
)
KEY = jax.random.key(0)


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """A model of random numbers, far from symmetric.

  They are not those of an initialised model, which would have to be compiled for each config.
  """

  def draw(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = RNG(zlib.crc32(name.encode()))
    if 'scale' in name:
      return rng.uniform(0.5, 2, a.shape).astype(a.dtype)
    return rng.normal(scale=0.5, size=a.shape).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Transformer(KEY, cfg)))


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
    leaves = flatten(model)
    leaves['blocks/moe/router'] = 0 * leaves['blocks/moe/router']
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
  leaves = moe_layers(WEIGHTS, MoEConfig(router, d_expert=F // g), 0.0, KEY)
  x = RNG(9).normal(size=(5, D))
  for layer in range(L):
    want = dense({name: w[layer] for name, w in WEIGHTS.items()}, x)
    y = np.zeros_like(want)
    for e in range(router.top_k):
      expert = {name: leaves[f'blocks/moe/experts/{name}'][layer, e] for name in WEIGHTS}
      expert = {name: np.asarray(w, np.float64) for name, w in expert.items()}
      y += total / router.top_k * dense(expert, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('experts', 'g'),
  [
    (8, 4),
    *(pytest.param(8, g, marks=pytest.mark.slow) for g in (1, 2)),
    *(pytest.param(4, g, marks=pytest.mark.slow) for g in (1, 2, 4)),
  ],
)
def test_all_experts_with_equal_weights_give_the_dense_logits(experts: int, g: int) -> None:
  assert_dense(target(RouterConfig(experts, experts, renormalise=False), F // g), zero_routers=True)


TIED = dataclasses.replace(
  SOURCE,
  tie_embeddings=True,
  ffn_pattern=('moe', 'dense'),
  moe=dataclasses.replace(SOURCE.moe, router=RouterConfig(1, 1, scale=2.0)),
)


def test_whole_copies_give_the_dense_logits_whatever_the_router_says() -> None:
  """Before a dense layer, of which the source has none."""
  groups = RouterConfig(8, 4, score_fn='sigmoid', scale=2.5, num_groups=2)
  cfg = target(groups, 4, ffn_pattern=('moe', 'dense'))
  router = made(cfg).blocks.moe.router[...]
  assert np.ptp(router[..., :4], axis=-1).max() == np.ptp(router[..., 4:], axis=-1).max() == 0
  assert np.ptp(router, axis=-1).min() > 0
  assert np.isin(router, model_of(cfg).blocks.moe.router[...]).all()
  assert_dense(cfg)


def test_shared_experts_dense_layers_and_other_heads_give_the_dense_logits() -> None:
  """From a tied model whose last block is dense, with a scaled expert, to one whose first is.

  The shared expert has 7 of 16 hidden units, and three slices the rest.
  """
  router = RouterConfig(6, 3, scale=3.0)
  shared = {'num_shared': 1, 'd_shared': 7, 'shared_gate': True}
  assert_dense(target(router, 3, **shared, num_dense_layers=1, mtp_depth=1), TIED)


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
    grad = np.asarray(getattr(grads.blocks.moe.experts, name)[...])
    for a, b in itertools.combinations(range(4), 2):
      assert np.abs(grad[:, a] - grad[:, b]).max() > 1e-6, name


def test_dropped_units_are_drawn_anew_with_the_statistics_of_what_they_replace() -> None:
  old = {
    name: RNG(i).normal(i, 0.1 + i, size=(64, 256)).astype(np.float32)
    for i, name in enumerate(WEIGHTS)
  }
  new = jax.jit(redraw_units, static_argnums=1, compiler_options=QUICK)(old, 0.3, KEY)
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
  assert (kept.sum(-1) == F // 4).all()
  assert len({row.tobytes() for row in kept.reshape(-1, F // 2)}) > 6
  anew = make(model_of(SOURCE), model_of(cfg), UpcycleConfig(1.0), KEY)
  assert (plain != anew.blocks.moe.experts.up[...]).all()
