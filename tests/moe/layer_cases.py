"""Layers of every kind, what they are given, and how they are run."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.config import frozendict
from moejax.moe.balance.fit import fit_problems
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.layer import MoE, MoEAux, MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS, Tokens
from moejax.moe.token_sets import Scope
from tests.support.quick import QUICK

B, S, D, F, MICRO_BATCHES = 2, 6, 8, 4, 2


DY = np.random.default_rng(2).normal(size=(B, S, D)).astype(np.float32)


COEFFICIENTS = {name: 0.1 + 0.2 * i for i, name in enumerate(sorted(BALANCE_LOSSES))}


ROUTERS = {
  score_fn: RouterConfig(8, 2, score_fn, num_groups=2, top_groups=1, scale=1.5)
  for score_fn in sorted(SCORE_FNS)
}


DROPLESS = [
  MoEConfig(router, DispatchConfig(name), F, 2)
  for router, name in itertools.product(ROUTERS.values(), sorted(DISPATCHERS))
]


TIGHT = [
  MoEConfig(ROUTERS['softmax'], DispatchConfig('dense_matmul', 0.5, drop_by), F, 2)
  for drop_by in DROP_BY
]


# Selections with room for other score functions than softmax; expert choice, whose copies are
# uneven, by each dispatcher.
SELECTED = [
  MoEConfig(
    RouterConfig(
      4, 1, sorted(SCORE_FNS)[i % 3], selection=name, renormalise=name == 'expert_choice', scale=1.5
    ),
    DispatchConfig(dispatcher),
    F,
  )
  for i, name in enumerate(sorted(SELECTIONS))
  for dispatcher in sorted(DISPATCHERS)
  if name == 'expert_choice' or dispatcher == 'dense_matmul'
]


NOISY = MoEConfig(RouterConfig(4, 2, 'sigmoid', noisy=True, jitter=0.3), DispatchConfig(), F)


GPT_OSS = MoEConfig(
  RouterConfig(8, 2, weigh='softmax', logit_bias=True),
  DispatchConfig(),
  F,
  activation='clamped_swiglu',
  activation_limit=1.5,
  expert_bias=True,
)


QWEN2 = MoEConfig(
  RouterConfig(8, 2, renormalise=False),
  DispatchConfig('dense_matmul'),
  F,
  num_shared=2,
  d_shared=3,
  shared_gate=True,
)


OF_FAMILIES = [
  dataclasses.replace(cfg, dispatch=dispatch)
  for cfg in (GPT_OSS, QWEN2)
  for dispatch in (*map(DispatchConfig, sorted(DISPATCHERS)), *(cfg.dispatch for cfg in TIGHT))
]


LAYERS = [*DROPLESS, *TIGHT, *SELECTED, NOISY, *OF_FAMILIES]


# Differentiated where time is short; the others there give their output alone.
FIRST = [
  *(cfg for cfg in DROPLESS if cfg.router.score_fn == 'softmax'),
  next(cfg for cfg in SELECTED if cfg.router.selection == 'expert_choice'),
  NOISY,
  GPT_OSS,
  QWEN2,
]


def name_of(cfg: MoEConfig) -> str:
  parts = [cfg.router.score_fn, cfg.router.selection, cfg.dispatch.dispatcher]
  switches = {
    cfg.dispatch.drop_by: cfg.dispatch.capacity_factor,
    'noisy': cfg.router.noisy,
    'shared_gate': cfg.shared_gate,
    cfg.activation: cfg.expert_bias,
  }
  return '-'.join(parts + [name for name, on in switches.items() if on])


layers = functools.partial(pytest.mark.parametrize, 'cfg', ids=name_of)


class Given(NamedTuple):
  x: np.ndarray  # [B, S, D]
  bias: np.ndarray  # [E]
  mask: np.ndarray  # [B, S]
  segments: np.ndarray
  ids: np.ndarray

  def tokens(self, key: Array | None = None) -> Tokens:
    return Tokens(self.ids, self.mask, self.segments, jnp.array([5, 3]), key)


@functools.cache
def given(num_experts: int) -> Given:
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 0, 0]], np.int32)
  return Given(
    rng.normal(size=(B, S, D)).astype(np.float32),
    rng.normal(size=num_experts).astype(np.float32),
    segments > 0,
    segments,
    rng.permutation(B * S).reshape(B, S).astype(np.int32),
  )


def given_to(cfg: MoEConfig) -> Given:
  return given(cfg.router.num_experts)


def key_of(cfg: MoEConfig) -> Array | None:
  return jax.random.key(9) if cfg.router.random else None


SCOPES = frozendict(
  {name: Scope(BALANCE_LOSSES[name].rows(B, MICRO_BATCHES, 1)) for name in COEFFICIENTS}
)


def scopes_for(cfg: MoEConfig, bias_rule: str = '') -> frozendict:
  """All losses that can do something for this router, and with this rule."""
  fitting = {}
  for name, scope in SCOPES.items():
    problems = fit_problems(cfg.router, {name: scope}, bias_rule, loss='{}', rule='bias_rule')
    if not any(problems):
      fitting[name] = scope
  return frozendict(fitting)


@functools.cache
def layer(cfg: MoEConfig, bias_rule: str = '', has_losses: bool = True) -> MoE:
  """Of random numbers, the noise's too: initialised for real it would have to be compiled."""
  rng = np.random.default_rng(1)
  scopes = scopes_for(cfg, bias_rule) if has_losses else frozendict()
  shapes = jax.eval_shape(lambda: MoE(jax.random.key(0), D, cfg, scopes, bias_rule, std=0.5))
  return jax.tree.map(lambda a: rng.normal(scale=0.5, size=a.shape).astype(np.float32), shapes)


def with_parameters(moe: MoE, change: Callable[[str, Array], Array]) -> MoE:
  """A layer like this one, each of its arrays changed by `change(name, array)`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, a: change(jax.tree_util.keystr(path), a), moe
  )


@functools.partial(jax.jit, compiler_options=QUICK)
def run(
  moe: MoE, x: Array, bias: Array, tokens: Tokens, dy: Array
) -> tuple[Array, MoEAux, tuple[MoE, Array, Array]]:
  """y, aux, and the gradients of y · dy + Σ coefficient · loss to the layer, x and the bias."""

  def objective(moe: MoE, x: Array, bias: Array) -> tuple[Array, tuple[Array, MoEAux]]:
    y, aux = moe(x, bias, tokens, {})
    return (y * dy).sum() + sum(COEFFICIENTS[name] * value for name, value in aux.losses.items()), (
      y,
      aux,
    )

  gradients, (y, aux) = jax.grad(objective, (0, 1, 2), has_aux=True)(moe, x, bias)
  return y, aux, gradients


forward = jax.jit(lambda moe, x, bias, tokens: moe(x, bias, tokens, {}), compiler_options=QUICK)


def run_on(
  cfg: MoEConfig, g: Given, dy: np.ndarray = DY
) -> tuple[Array, MoEAux, tuple[MoE, Array, Array]]:
  return run(layer(cfg), g.x, g.bias, g.tokens(key_of(cfg)), dy)


@functools.cache
def ran(cfg: MoEConfig) -> tuple[np.ndarray, MoEAux, tuple[MoE, np.ndarray, np.ndarray]]:
  return jax.tree.map(np.asarray, run_on(cfg, given_to(cfg)))


def output(cfg: MoEConfig, g: Given) -> tuple[np.ndarray, MoEAux]:
  """y and the aux, by a program that is there already, or one without losses and gradients."""
  if cfg in FIRST:
    return jax.tree.map(np.asarray, run_on(cfg, g)[:2])
  moe = layer(cfg, has_losses=False)
  return jax.tree.map(np.asarray, forward(moe, g.x, g.bias, g.tokens(key_of(cfg))))


def parameters(moe: MoE) -> dict[str, np.ndarray]:
  """All there are, by their paths (router, experts.gate, shared.down, ...), in float64."""
  return {
    jax.tree_util.keystr(path[:-1], simple=True, separator='.'): np.asarray(a, np.float64)
    for path, a in jax.tree_util.tree_flatten_with_path(moe)[0]
  }
