"""The MoE layer against the oracle: output, aux, the gradient of every parameter, and what they depend on."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import oracle
import pytest
from jax import Array

from moejax.config import ConfigError, frozendict
from moejax.moe.balance import BALANCE_LOSSES, Scope
from moejax.moe.dispatch import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.layer import MoE, MoEAux, MoEConfig, Tokens
from moejax.moe.routing import SCORE_FNS, RouterConfig

QUICK = {'xla_backend_optimization_level': 0}   # programs run once or twice: compiling is all the time
B, S, D, F = 2, 6, 8, 4
DY = np.random.default_rng(2).normal(size=(B, S, D)).astype(np.float32)
COEFFICIENTS = {name: 0.1 + 0.2 * i for i, name in enumerate(sorted(BALANCE_LOSSES))}
ROUTERS = {score_fn: RouterConfig(8, 2, score_fn, num_groups=2, top_groups=1, scale=1.5)
           for score_fn in sorted(SCORE_FNS)}
DROPLESS = [MoEConfig(router, DispatchConfig(name), F, 2)
            for router, name in itertools.product(ROUTERS.values(), sorted(DISPATCHERS))]
TIGHT = [MoEConfig(ROUTERS['softmax'], DispatchConfig('dense_matmul', 0.5, drop_by), F, 2)
         for drop_by in DROP_BY]
SMALL = MoEConfig(RouterConfig(4, 1, 'sigmoid', num_groups=2, top_groups=1, scale=1.5), DispatchConfig(), F)
LAYERS = [SMALL, *DROPLESS, *TIGHT]

layers = functools.partial(pytest.mark.parametrize, 'cfg', ids=lambda cfg: '-'.join(map(str, (
  cfg.router.score_fn, cfg.router.num_experts, cfg.dispatch.dispatcher, cfg.dispatch.capacity_factor,
  cfg.dispatch.drop_by))))


class Given(NamedTuple):
  x: np.ndarray     # [B, S, D]
  bias: np.ndarray  # [E]
  mask: np.ndarray  # [B, S]
  segments: np.ndarray


@functools.cache
def given(num_experts: int) -> Given:
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 0, 0]], np.int32)
  return Given(rng.normal(size=(B, S, D)).astype(np.float32), rng.normal(size=num_experts).astype(np.float32),
               segments > 0, segments)


@functools.cache
def layer(cfg: MoEConfig) -> MoE:
  scopes = frozendict({name: Scope(BALANCE_LOSSES[name].rows(B, 2, 1), 'unbiased') for name in COEFFICIENTS})
  return jax.jit(lambda key: MoE(key, D, cfg, scopes, std=0.5), compiler_options=QUICK)(jax.random.key(1))


@functools.partial(jax.jit, compiler_options=QUICK)
def run(moe: MoE, x: Array, bias: Array, mask: Array, segments: Array,
        dy: Array) -> tuple[Array, MoEAux, tuple[MoE, Array, Array]]:
  """y, aux, and the gradients of y · dy + Σ coefficient · loss to the layer, to x and to the bias."""

  def objective(moe: MoE, x: Array, bias: Array) -> tuple[Array, tuple[Array, MoEAux]]:
    y, aux = moe(x, bias, Tokens(mask, segments, {}))
    return (y * dy).sum() + sum(COEFFICIENTS[name] * value for name, value in aux.losses.items()), (y, aux)

  gradients, (y, aux) = jax.grad(objective, (0, 1, 2), has_aux=True)(moe, x, bias)
  return y, aux, gradients


@functools.cache
def ran(cfg: MoEConfig) -> tuple[np.ndarray, MoEAux, tuple[MoE, np.ndarray, np.ndarray]]:
  return jax.tree.map(np.asarray, run(layer(cfg), *given(cfg.router.num_experts), DY))


def parameters(moe: MoE) -> dict[str, np.ndarray]:
  """router, gate, up, down, and those of the shared experts where there are any, in float64."""
  names, found = ('gate', 'up', 'down'), {'router': moe.router}
  found |= {name: getattr(moe.experts, name) for name in names}
  if moe.cfg.num_shared:
    found |= {f'shared_{name}': getattr(moe.shared, name) for name in names}
  return {name: np.asarray(value[...], np.float64) for name, value in found.items()}


class Wanted(NamedTuple):
  y: np.ndarray
  losses: dict[str, float]
  routing: oracle.Routing
  kept: np.ndarray  # [T, K]


def oracle_layer(cfg: MoEConfig, p: dict[str, np.ndarray], x: np.ndarray,
                 like: Wanted | None = None) -> Wanted:
  """The layer in float64; who goes where and who is dropped as in `like`, where a slope is to be taken."""
  r, g = cfg.router, given(cfg.router.num_experts)
  logits = np.asarray(x, np.float64) @ p['router']
  routing = like.routing if like else oracle.route(
    logits, g.bias, top_k=r.top_k, score_fn=r.score_fn, num_groups=2, top_groups=1, scale=r.scale)
  ids = routing.expert_ids.reshape(B * S, -1)
  weights = oracle.weigh(logits, routing.expert_ids, r.score_fn, scale=r.scale)
  kept = like.kept if like else np.broadcast_to(g.mask.reshape(-1, 1), ids.shape)
  if cfg.dispatch.capacity_factor and not like:
    room = oracle.capacity_of(B * S, r.num_experts, r.top_k, cfg.dispatch.capacity_factor)
    priority = np.take_along_axis(oracle.probabilities(logits, r.score_fn), routing.expert_ids, -1)
    kept = oracle.kept_copies(np.where(kept, ids, r.num_experts), priority.reshape(ids.shape), r.num_experts,
                              room, cfg.dispatch.drop_by)
  shared = []
  for i in range(cfg.num_shared):  # one wide SwiGLU is as many experts side by side
    part = slice(i * F, (i + 1) * F)
    shared.append((p['shared_gate'][:, part], p['shared_up'][:, part], p['shared_down'][part]))
  y = oracle.moe(x.reshape(B * S, D), ids, weights.reshape(ids.shape), (p['gate'], p['up'], p['down']), kept,
                 shared)
  unbiased = oracle.assignment_of(routing.logits, ids.reshape(B, S, -1), r.score_fn, 'unbiased')
  losses = {name: oracle.loss(name, logits, unbiased, g.mask, g.segments, score_fn=r.score_fn,
                              assignment='dispatched', micro_batches=2) for name in COEFFICIENTS}
  return Wanted(y.reshape(B, S, D), losses, routing, kept)


@layers(LAYERS)
def test_output_aux_and_gradients_are_the_oracles(cfg: MoEConfig) -> None:
  y, aux, (to_moe, to_x, to_bias) = ran(cfg)
  g, p = given(cfg.router.num_experts), parameters(layer(cfg))
  want = oracle_layer(cfg, p, g.x)
  num_experts = cfg.router.num_experts
  np.testing.assert_allclose(y, want.y, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(aux.load, oracle.load(want.routing.expert_ids, g.mask, num_experts))
  routing = want.routing
  unbiased = oracle.assignment_of(routing.logits, routing.expert_ids, cfg.router.score_fn, 'unbiased')
  np.testing.assert_array_equal(aux.counted, oracle.load(unbiased, g.mask, num_experts))
  assert not np.array_equal(aux.load, aux.counted), 'the bias decides something, or this tests little'
  assert aux.losses.keys() == want.losses.keys()
  for name, value in want.losses.items():
    np.testing.assert_allclose(aux.losses[name], value, rtol=2e-6, err_msg=name)
  copies = g.mask.sum() * cfg.router.top_k
  assert aux.dropped == np.float32((copies - want.kept.sum()) / copies)
  assert (aux.dropped > 0) == (cfg in TIGHT)
  assert not to_bias.any(), 'the bias has a gradient'

  def objective(p: dict[str, np.ndarray]) -> float:
    out = oracle_layer(cfg, p, p['x'], want)
    return float((out.y * DY).sum()) + sum(COEFFICIENTS[name] * value for name, value in out.losses.items())

  p['x'] = g.x.astype(np.float64)
  for i, (name, gradient) in enumerate((parameters(to_moe) | {'x': to_x}).items()):
    direction = np.random.default_rng(i).normal(size=gradient.shape)
    slope = oracle.slope(lambda a, name=name: objective(p | {name: a}), p[name], direction)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-5,
                               atol=1e-5 * np.linalg.norm(gradient), err_msg=name)


def test_dispatchers_agree() -> None:
  for score_fn in SCORE_FNS:
    first, *others = (ran(cfg) for cfg in DROPLESS if cfg.router.score_fn == score_fn)
    for other in others:
      for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@layers(LAYERS)
def test_causal_unless_it_drops_by_score(cfg: MoEConfig) -> None:
  """What comes later in a row changes nothing before it, unless it can evict by score."""
  g, worst = given(cfg.router.num_experts), 0.0
  for row, begin in itertools.product(range(B), range(1, S)):
    x = g.x.copy()
    x[row, begin:] = 3 * g.x[row, begin - 1]   # keener on the very experts that an earlier token wants
    y = np.asarray(run(layer(cfg), x, *g[1:], DY)[0])
    worst = max(worst, np.abs(y - ran(cfg)[0])[row, :begin].max())
  if cfg in TIGHT and cfg.dispatch.drop_by == 'probs':
    assert worst > 1e-2, 'dropping by score leaks; a detector that does not see it sees nothing'
  else:
    assert worst < 1e-5


@layers(LAYERS)
def test_padding_changes_nothing_and_takes_no_room(cfg: MoEConfig) -> None:
  g = given(cfg.router.num_experts)
  dy = np.where(g.mask[..., None], DY, 0)
  garbage = np.random.default_rng(5).normal(scale=30, size=g.x.shape).astype(np.float32)
  one, two = (run(layer(cfg), x, *g[1:], dy) for x in (g.x, np.where(g.mask[..., None], g.x, garbage)))
  np.testing.assert_allclose(one[0][g.mask], two[0][g.mask], rtol=1e-5, atol=1e-5)
  for a, b in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(two[1:]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  if not cfg.num_shared:
    assert not np.asarray(two[0])[~g.mask].any(), 'routed experts give padding 0'
  assert not np.asarray(two[2][1])[~g.mask].any()


def with_parameters(moe: MoE, change: Callable[[str, Array], Array]) -> MoE:
  """A layer like this one, each of its arrays changed by `change(name, array)`."""
  return jax.tree_util.tree_map_with_path(lambda path, a: change(jax.tree_util.keystr(path), a), moe)


@layers(LAYERS)
def test_strange_batches_stay_finite(cfg: MoEConfig) -> None:
  """Nothing that counts; one token that does; all alike; all zero; logits of ±1e4."""
  g, moe = given(cfg.router.num_experts), layer(cfg)
  steep = with_parameters(moe, lambda name, a: 1e4 * a if 'router' in name else a)
  nobody, one = np.zeros((B, S), bool), np.zeros((B, S), bool)
  one[1, 2] = True
  for label, of, strange in (
      ('nobody', moe, g._replace(mask=nobody)), ('one', moe, g._replace(mask=one)),
      ('alike', moe, g._replace(x=np.broadcast_to(g.x[:1, :1], g.x.shape))),
      ('zeros', moe, g._replace(x=0 * g.x)), ('steep', steep, g)):
    y, aux, gradients = run(of, *strange, DY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, aux, gradients))), label
    assert aux.load.sum() == aux.counted.sum() == strange.mask.sum() * cfg.router.top_k, label
    if label == 'nobody':
      assert aux.dropped == 0 and not any(aux.losses.values())
      assert not parameters(gradients[0])['router'].any()


@layers(DROPLESS)
def test_renaming_experts_renames_their_load_and_nothing_else(cfg: MoEConfig) -> None:
  g = given(8)
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together

  def rename(name: str, a: Array) -> Array:
    return a[:, old_name] if 'router' in name else a[old_name] if 'experts' in name else a

  renamed = with_parameters(layer(cfg), rename)
  y, aux, (to_moe, to_x, _) = run(renamed, g.x, g.bias[old_name], g.mask, g.segments, DY)
  want_y, want, (want_moe, want_x, _) = ran(cfg)
  np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(to_x, want_x, rtol=1e-5, atol=1e-5)
  for a, b in zip(jax.tree.leaves(to_moe), jax.tree.leaves(with_parameters(want_moe, rename)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(aux.load, want.load[old_name])
  for name, value in want.losses.items():
    np.testing.assert_allclose(aux.losses[name], value, rtol=1e-6)


def test_counts_of_a_set_that_spans_micro_batches_come_from_outside() -> None:
  """f is that of the whole set, P that of the tokens at hand."""
  cfg, counts, g = DROPLESS[-1], np.arange(8, dtype=np.float32), given(8)
  tokens = Tokens(g.mask, g.segments, {'global_batch': counts})
  aux = jax.jit(lambda moe: moe(g.x, g.bias, tokens)[1])(layer(cfg))
  p = oracle.probabilities(g.x.astype(np.float64) @ parameters(layer(cfg))['router'], cfg.router.score_fn)
  want = (8 * counts / counts.sum() * p[g.mask].mean(0)).sum()
  np.testing.assert_allclose(aux.losses['global_batch'], want, rtol=1e-6)
  np.testing.assert_allclose(aux.losses['micro_batch'], ran(cfg)[1].losses['micro_batch'], rtol=1e-6)


def test_a_layer_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    MoEConfig(d_expert=0, num_shared=-1)
  assert [problem.split(':')[0] for problem in error.value.problems] == ['d_expert=0', 'num_shared=-1']
