"""Where experts choose: their own dispatch gives what sorting a place for every expert would."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.weights import Weights
from moejax.moe.routing import RouterConfig, Routing, route
from moejax.moe.selection import whole_rows
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.dispatch_oracle import DY, GPT_OSS, LIMIT, B, D, S, experts
from tests.support.emulated_exchange import emulate
from tests.support.quick import QUICK

E, K = 4, 2  # of rows of five tokens each expert takes three
CFG = RouterConfig(E, K, selection='expert_choice', renormalise=False)
MASK = np.arange(S) < np.array([[5], [2], [0], [4]])
WAYS = [
  DispatchConfig('dense_matmul'),
  *(DispatchConfig('sparse_matmul', exchange=name) for name in ('gather', 'ragged')),
]


class Result(NamedTuple):
  y: Array
  gradients: tuple[Array, Array, Weights]
  dropped: Array


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
  """x [B, S, D] and logits [B, S, E]."""
  rng = np.random.default_rng(7)
  x, logits = rng.normal(size=(B, S, D)), rng.normal(size=(B, S, E))
  return x.astype(np.float32), logits.astype(np.float32)


@functools.cache
def routing(by_quota: bool) -> Routing:
  """Of expert choice, padding unassigned; or without a quota, every token at all experts."""
  with jax.disable_jit():
    found = route(inputs()[1], jnp.zeros(E), CFG, whole_rows(MASK))
  ids = found.expert_ids if by_quota else np.broadcast_to(np.arange(E, dtype=np.int32), (B, S, E))
  return jax.tree.map(np.asarray, found._replace(expert_ids=np.where(MASK[..., None], ids, E)))


def run(cfg: DispatchConfig, by_quota: bool, expert_top_k: int) -> Result:
  x, _ = inputs()
  found = routing(by_quota)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(x: Array, copy_weights: Array, weights: Weights) -> Result:
    def f(x: Array, copy_weights: Array, weights: Weights) -> tuple[Array, Array]:
      activation = ACTIVATIONS[GPT_OSS.activation](LIMIT)
      routed = found._replace(weights=copy_weights)
      dispatcher = DISPATCHERS[cfg.dispatcher]
      return dispatcher(x, routed, weights, activation, cfg, expert_top_k=expert_top_k)

    y, pull, dropped = jax.vjp(f, x, copy_weights, weights, has_aux=True)
    return Result(y, pull(DY), dropped)

  return jax.tree.map(np.asarray, both(x, found.weights, experts(E, GPT_OSS.bias)))


@functools.cache
def as_tokens_choose() -> Result:
  """By the dispatcher that takes any routing, which other tests hold against the oracle."""
  return run(DispatchConfig(), by_quota=True, expert_top_k=0)


def check(got: Result) -> None:
  want = as_tokens_choose()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize('name', sorted(DISPATCHERS))
def test_own_dispatch_gives_the_same_and_takes_no_more_than_the_quota(name: str) -> None:
  check(run(DispatchConfig(name), by_quota=True, expert_top_k=K))
  assert (as_tokens_choose().gradients[0][~MASK] == 0).all()
  # Of a routing that gives experts more, the first of each row stay, and the rest is counted.
  beyond = run(DispatchConfig(name), by_quota=False, expert_top_k=K)
  most = math.ceil(S * K / E)
  kept = np.minimum(MASK.sum(1), most).sum()
  np.testing.assert_allclose(beyond.dropped, 1 - kept / MASK.sum(), rtol=1e-6)
  assert not beyond.y[:, most:].any() and beyond.y[:, :most][MASK[:, :most]].all()


@pytest.mark.parametrize('cfg', WAYS, ids=lambda cfg: f'{cfg.dispatcher}-{cfg.exchange}')
def test_on_a_mesh_too(cfg: DispatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
  emulate(monkeypatch)
  sizes = MeshConfig(data=2, expert=2)
  with jax.set_mesh(make_mesh(sizes, jax.devices()[:4])):
    check(run(cfg, by_quota=True, expert_top_k=K))
