"""Dispatchers against the oracle and each other: outputs, gradients, what is dropped, and causality."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import Array
from quick import QUICK

from moejax.config import ConfigError
from moejax.moe.dispatch import DISPATCHERS, DROP_BY, DispatchConfig, sort_copies
from moejax.moe.grouped_ffn import IMPLEMENTATIONS, Weights
from moejax.moe.routing import Routing
from moejax.sharding import MeshConfig, make_mesh

B, S, D, F = 4, 5, 6, 4
T = B * S
SHAPES = list(itertools.product((4, 8), (1, 2)))
DROPLESS = [DispatchConfig(name) for name in sorted(DISPATCHERS)]
ROOMY = [DispatchConfig('dense_matmul', 8.0, drop_by) for drop_by in DROP_BY]   # C = N: room for all copies
TIGHT = [DispatchConfig('dense_matmul', factor, drop_by) for factor in (0.45, 1.0) for drop_by in DROP_BY]
# Every dispatcher at every shape; the two sides of dropping at the shapes that differ most, to compile less.
JOBS = [(cfg, *shape) for shape in SHAPES for cfg in DROPLESS]
JOBS += [(cfg, 4, 2) for cfg in (*ROOMY, *TIGHT)] + [(cfg, 8, 1) for cfg in TIGHT[:2]]


def name_of(value: object) -> str:
  return '-'.join(map(str, dataclasses.astuple(value))) if isinstance(value, DispatchConfig) else str(value)


configs = functools.partial(pytest.mark.parametrize, 'cfg', ids=name_of)


class Job(NamedTuple):
  x: np.ndarray           # [B, S, D]
  expert_ids: np.ndarray  # [B, S, K], E for a token that does not count
  scores: np.ndarray      # [B, S, E]
  weights: np.ndarray     # [B, S, K]


@functools.cache
def experts(num_experts: int) -> Weights:
  rng = np.random.default_rng(num_experts)
  shapes = ((num_experts, D, F), (num_experts, D, F), (num_experts, F, D))
  return Weights(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


@functools.cache
def jobs(num_experts: int, top_k: int) -> dict[str, Job]:
  """Batches by what is unusual about who goes where."""
  rng = np.random.default_rng(10 * num_experts + top_k)
  ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(T)], np.int32).reshape(B, S, top_k)
  job = Job(rng.normal(size=(B, S, D)).astype(np.float32), ids,
            rng.dirichlet(np.ones(num_experts), (B, S)).astype(np.float32),
            rng.normal(size=(B, S, top_k)).astype(np.float32))
  counts = np.arange(S) < np.array([[5], [2], [0], [4]])
  unchosen = np.concatenate([1 + ids[..., :1] % 2, 3 + 0 * ids[..., 1:]], -1)   # 1 or 2, and 3
  return {
    'plain': job,
    'padded': job._replace(expert_ids=np.where(counts[..., None], ids, num_experts)),
    'all to the same': job._replace(expert_ids=np.arange(1, top_k + 1, dtype=np.int32) + 0 * ids),
    'one unchosen': job._replace(expert_ids=unchosen),
    'tied scores': job._replace(scores=np.full((B, S, num_experts), 1 / num_experts, np.float32)),
    'single token': job._replace(expert_ids=np.where(np.arange(T).reshape(B, S, 1) == 7, ids, num_experts)),
    'nothing': job._replace(expert_ids=np.full_like(ids, num_experts)),
  }


def dispatch(cfg: DispatchConfig, job: Job, weights: Weights) -> tuple[Array, Array]:
  routing = Routing(job.scores, job.scores, job.scores, job.expert_ids, job.weights, best_ids=job.expert_ids,
                    margin=job.weights[..., 0], likely=job.scores, router=job.scores[0])
  return DISPATCHERS[cfg.dispatcher](job.x, routing, weights, cfg)


@functools.partial(jax.jit, static_argnames='cfg', compiler_options=QUICK)
def run(cfg: DispatchConfig, job: Job, weights: Weights,
        dy: Array) -> tuple[Array, Array, tuple[Array, Array, Weights]]:
  """y, the dropped fraction, and the gradients of y · dy to x, to the routing weights and to the experts."""
  def f(x: Array, w: Array, weights: Weights) -> tuple[Array, Array]:
    return dispatch(cfg, job._replace(x=x, weights=w), weights)
  y, pull, dropped = jax.vjp(f, job.x, job.weights, weights, has_aux=True)
  return y, dropped, pull(dy)


@functools.cache
def ran(cfg: DispatchConfig, num_experts: int, top_k: int,
        label: str) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, Weights]]:
  dy = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
  return jax.tree.map(np.asarray, run(cfg, jobs(num_experts, top_k)[label], experts(num_experts), dy))


def kept_of(cfg: DispatchConfig, job: Job, num_experts: int) -> np.ndarray:
  """[T, K] bool: the copies that the oracle computes."""
  ids = job.expert_ids.reshape(T, -1)
  if cfg.capacity_factor == 0:
    return ids < num_experts
  scores = np.concatenate([job.scores, np.zeros((B, S, 1))], -1)
  priority = np.take_along_axis(scores, job.expert_ids, -1).reshape(ids.shape)
  room = oracle.capacity_of(T, num_experts, ids.shape[1], cfg.capacity_factor)
  return oracle.kept_copies(ids, priority, num_experts, room, cfg.drop_by)


def check_gradients(gradients: tuple[Array, Array, Weights], job: Job, weights: Weights, kept: np.ndarray,
                    dy: np.ndarray, label: str) -> None:
  """Each gradient against the slope of the oracle's y · dy along a random direction of that argument."""
  ids = job.expert_ids.reshape(len(kept), -1)

  def f(x: np.ndarray, w: np.ndarray, *projections: np.ndarray) -> float:
    y = oracle.moe(x.reshape(len(kept), -1), ids, w.reshape(ids.shape), projections, kept)
    return float((y * dy.reshape(y.shape)).sum())

  arguments = [np.asarray(a, np.float64) for a in (job.x, job.weights, *weights)]
  for i, gradient in enumerate((gradients[0], gradients[1], *gradients[2])):
    direction = np.random.default_rng(i).normal(size=arguments[i].shape)
    slope = oracle.slope(lambda a, i=i: f(*arguments[:i], a, *arguments[i + 1:]), arguments[i], direction)
    np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), slope, rtol=1e-5,
                               atol=1e-5 * np.linalg.norm(gradient) + 1e-7, err_msg=f'{label}, argument {i}')


@pytest.mark.parametrize(('cfg', 'num_experts', 'top_k'), JOBS, ids=name_of)
def test_outputs_gradients_and_drops_are_the_oracles(cfg: DispatchConfig, num_experts: int,
                                                     top_k: int) -> None:
  dy = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
  weights = experts(num_experts)
  for label, job in jobs(num_experts, top_k).items():
    y, dropped, gradients = ran(cfg, num_experts, top_k, label)
    kept, ids = kept_of(cfg, job, num_experts), job.expert_ids.reshape(T, -1)
    want = oracle.moe(job.x.reshape(T, D), ids, job.weights.reshape(ids.shape), weights, kept)
    np.testing.assert_allclose(y.reshape(T, D), want, rtol=1e-5, atol=2e-5, err_msg=label)
    copies = (ids < num_experts).sum()
    assert dropped == np.float32((copies - kept.sum()) / max(1, copies)), label
    check_gradients(gradients, job, weights, kept, dy, label)
    assert not gradients[1].reshape(T, -1)[~kept].any(), 'a copy that nobody computed has a gradient'
    for e in set(range(num_experts)) - set(ids[kept].tolist()):
      assert not any(g[e].any() for g in gradients[2]), 'an expert that saw nobody has a gradient'


@pytest.mark.parametrize(('num_experts', 'top_k'), SHAPES)
def test_dispatchers_that_drop_nothing_agree(num_experts: int, top_k: int) -> None:
  for label in jobs(num_experts, top_k):
    first, *others = (ran(cfg, num_experts, top_k, label) for cfg in
                     (DROPLESS if (num_experts, top_k) != (4, 2) else [*DROPLESS, *ROOMY]))
    for other in others:
      assert other[1] == 0
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), first, other)


def test_tight_buffers_do_drop() -> None:
  """Or the tests above would say nothing about who stays."""
  for cfg in TIGHT:
    assert 0 < ran(cfg, 4, 2, 'plain')[1] < 0.7
  by_place, by_score = (ran(cfg, 4, 2, 'plain')[0] for cfg in TIGHT[:2])
  assert np.abs(by_place - by_score).max() > 0.1


@configs([*DROPLESS, *ROOMY, *TIGHT])
def test_causal_unless_it_drops_by_score(cfg: DispatchConfig) -> None:
  """Later tokens that are keener on the same experts change nothing before them, but where they can evict."""
  job = jobs(4, 2)['plain']
  later = np.arange(T).reshape(B, S, 1) >= T // 2
  keener = job._replace(x=np.where(later, -job.x, job.x), scores=np.where(later, 1 + job.scores, job.scores),
                        expert_ids=np.where(later, job.expert_ids[..., ::-1], job.expert_ids))
  dy = np.zeros((B, S, D), np.float32)
  before, after = (np.asarray(run(cfg, j, experts(4), dy)[0]).reshape(T, D)[:T // 2] for j in (job, keener))
  assert np.array_equal(before, after) == (cfg not in TIGHT or cfg.drop_by != 'probs')


@pytest.mark.parametrize('implementation', sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize('to_one', [False, True])
def test_grouped_ffn_over_many_blocks(implementation: str, to_one: bool) -> None:
  """More copies than a block has rows, blocks that reach into another expert's rows, copies of nobody."""
  tokens, num_experts = 90, 4
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(2, tokens, D)).astype(np.float32)
  ids = np.array([rng.permutation(num_experts)[:2] for _ in range(tokens)], np.int32)
  ids = np.where(np.arange(2) == 0, 2, -1) + 0 * ids if to_one else np.where(ids == 1, num_experts, ids)
  kept = (ids >= 0) & (ids < num_experts)
  job, weights = Job(x, ids, x, rng.normal(size=ids.shape).astype(np.float32)), experts(num_experts)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(x: Array, w: Array, weights: Weights,
           dy: Array) -> tuple[Array, tuple[Array, Array, Weights], Array]:
    copies, unsort = jax.vjp(lambda w: sort_copies(jnp.asarray(ids), w, num_experts), w)
    forward, backward = IMPLEMENTATIONS[implementation]
    y, gate, up = forward(x, copies, weights)
    dx, d_copies, d_weights = backward((x, copies, weights, gate, up), dy)
    none = [np.zeros(n, jax.dtypes.float0) for n in (ids.size, num_experts)]
    dw, = unsort(copies._replace(tokens=none[0], weights=d_copies, load=none[1]))
    return y, (dx, dw, d_weights), copies.load

  y, gradients, load = both(x, job.weights, weights, dy)
  np.testing.assert_array_equal(load, [(ids == e).sum() for e in range(num_experts)])
  np.testing.assert_allclose(y, oracle.moe(x, ids, job.weights, weights, kept), rtol=1e-5, atol=2e-5)
  check_gradients(gradients, job, weights, kept, dy, implementation)


@configs(DROPLESS)
def test_compute_dtype_is_that_of_x(cfg: DispatchConfig) -> None:
  job = jobs(4, 2)['padded']
  low = job._replace(x=jnp.asarray(job.x, jnp.bfloat16))
  weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), experts(4))
  y, _, gradients = jax.eval_shape(run, cfg, low, weights, low.x)
  assert y.dtype == gradients[0].dtype == gradients[2].gate.dtype == jnp.bfloat16
  assert gradients[1].dtype == jnp.float32
  y, exact = jax.jit(dispatch, static_argnums=0)(cfg, low, weights)[0], ran(cfg, 4, 2, 'padded')[0]
  assert 0 < np.abs(np.asarray(y, np.float32) - exact).max() < 0.03 * np.abs(exact).max()


@configs([*DROPLESS, ROOMY[0]])
def test_a_mesh_changes_nothing(cfg: DispatchConfig) -> None:
  """Experts over two devices, their hidden layer over two, rows over two times two."""
  dy = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
    got = jax.tree.map(np.asarray, run(cfg, jobs(4, 2)['padded'], experts(4), dy))
  want = ran(cfg, 4, 2, 'padded')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(('fields', 'named'), [
  ({'dispatcher': 'dense'}, "dispatcher='dense' is not one of"),
  ({'capacity_factor': -1.0}, 'capacity_factor=-1.0'),
  ({'dispatcher': 'sparse_matmul', 'capacity_factor': 1.0}, 'capacity_factor=1.0 has no meaning'),
  ({'drop_by': 'score'}, "drop_by='score' is not one of"),
])
def test_a_dispatch_that_cannot_be_is_one_clear_error(fields: dict[str, str | float], named: str) -> None:
  with pytest.raises(ConfigError) as error:
    DispatchConfig(**fields)
  assert len(error.value.problems) == 1 and error.value.problems[0].startswith(named)
