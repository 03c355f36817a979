"""Batches for dispatchers, and the oracle that they are held against: outputs, gradients, drops.

Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token, T = B * S.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from moejax.moe.dispatch.dispatchers import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.weights import Biases, Weights
from moejax.moe.routing import Routing
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support import oracle
from tests.support.quick import QUICK

B, S, D, F = 4, 5, 6, 4
T = B * S
DY = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
LIMIT = 1.5  # of the clamped: a good part of the pre-activations are beyond it

DROPLESS = [DispatchConfig(name) for name in sorted(DISPATCHERS)]
# C = N: room for all copies
ROOMY = [DispatchConfig('dense_matmul', 8.0, drop_by) for drop_by in DROP_BY]
TIGHT = [DispatchConfig('dense_matmul', c, drop_by) for c in (0.45, 1.0) for drop_by in DROP_BY]


class Ffn(NamedTuple):
  """A kind of expert."""

  activation: str
  bias: bool

  def __str__(self) -> str:
    return self.activation + '-biased' * self.bias

  def oracle(self, *args: np.ndarray) -> np.ndarray:
    """One token through an expert of this kind."""
    return ORACLE_FFNS[self.activation](*args)


ORACLE_FFNS = {
  'swiglu': oracle.swiglu,
  'clamped_swiglu': functools.partial(oracle.clamped_swiglu, limit=LIMIT),
}
PLAIN, GPT_OSS = Ffn('swiglu', False), Ffn('clamped_swiglu', True)


class Job(NamedTuple):
  """A batch and its routing."""

  x: np.ndarray  # [B, S, D]
  expert_ids: np.ndarray  # [B, S, K], E for a token that does not count
  scores: np.ndarray  # [B, S, E]
  weights: np.ndarray  # [B, S, K]


class Result(NamedTuple):
  """What a dispatcher makes of a job, and the gradients of y · dy."""

  y: Array  # [B, S, D]
  dropped: Array  # scalar
  gradients: tuple[Array, Array, Weights]  # to x, to the routing weights and to the experts


def name_of(value: object) -> str:
  """The id of a pytest parameter."""
  if isinstance(value, DispatchConfig):
    return '-'.join(map(str, dataclasses.astuple(value)))
  return str(value)


@functools.cache
def experts(num_experts: int, bias: bool = False) -> Weights:
  """Random experts. The draws come in this order: matrices, then all biases."""
  rng = np.random.default_rng(num_experts)

  def normal(count: int, *shape: int) -> np.ndarray:
    return rng.normal(size=(count, num_experts, *shape)).astype(np.float32)

  gate, up = normal(2, D, F)
  (down,) = normal(1, F, D)
  gate_bias, up_bias = normal(2, F)
  (down_bias,) = normal(1, D)
  return Weights(gate, up, down, Biases(gate_bias, up_bias, down_bias) if bias else Biases())


@functools.cache
def jobs(num_experts: int, top_k: int) -> dict[str, Job]:
  """Batches by what is unusual about which token goes where."""
  rng = np.random.default_rng(10 * num_experts + top_k)
  permutations = [rng.permutation(num_experts)[:top_k] for _ in range(T)]
  ids = np.array(permutations, np.int32).reshape(B, S, top_k)
  plain = Job(
    x=rng.normal(size=(B, S, D)).astype(np.float32),
    expert_ids=ids,
    scores=rng.dirichlet(np.ones(num_experts), (B, S)).astype(np.float32),
    weights=rng.normal(size=(B, S, top_k)).astype(np.float32),
  )
  is_token = np.arange(S) < np.array([[5], [2], [0], [4]])
  is_seventh = np.arange(T).reshape(B, S, 1) == 7
  all_to_same = np.arange(top_k, dtype=np.int32) + 0 * ids  # and to one device
  unchosen = np.concatenate([1 + ids[..., :1] % 2, 3 + 0 * ids[..., 1:]], -1)  # 1 or 2, and 3
  even_scores = np.full((B, S, num_experts), 1 / num_experts, np.float32)
  return {
    'plain': plain,
    'padded': plain._replace(expert_ids=np.where(is_token[..., None], ids, num_experts)),
    'all to the same': plain._replace(expert_ids=all_to_same),
    'one unchosen': plain._replace(expert_ids=unchosen),
    'tied scores': plain._replace(scores=even_scores),
    'single token': plain._replace(expert_ids=np.where(is_seventh, ids, num_experts)),
    'nothing': plain._replace(expert_ids=np.full_like(ids, num_experts)),
  }


def dispatch(
  cfg: DispatchConfig, job: Job, weights: Weights, activation: str
) -> tuple[Array, Array]:
  """y and the dropped fraction."""
  routing = Routing(
    logits=job.scores,
    scores=job.scores,
    probs=job.scores,
    expert_ids=job.expert_ids,
    weights=job.weights,
    best_ids=job.expert_ids,
    margin=job.weights[..., 0],
    likely=job.scores,
    router=job.scores[0],
  )
  return DISPATCHERS[cfg.dispatcher](job.x, routing, weights, ACTIVATIONS[activation](LIMIT), cfg)


@functools.partial(jax.jit, static_argnames=('cfg', 'activation'), compiler_options=QUICK)
def run(
  cfg: DispatchConfig, job: Job, weights: Weights, dy: Array, activation: str = 'swiglu'
) -> Result:
  """Both passes of a dispatcher, compiled."""

  def f(x: Array, w: Array, weights: Weights) -> tuple[Array, Array]:
    return dispatch(cfg, job._replace(x=x, weights=w), weights, activation)

  y, pull, dropped = jax.vjp(f, job.x, job.weights, weights, has_aux=True)
  return Result(y, dropped, pull(dy))


@functools.cache
def run_on_one_device(
  cfg: DispatchConfig, num_experts: int, top_k: int, label: str, ffn: Ffn = PLAIN
) -> Result:
  """The result of a job by its label, computed once for all tests of a process."""
  job, weights = jobs(num_experts, top_k)[label], experts(num_experts, ffn.bias)
  return jax.tree.map(np.asarray, run(cfg, job, weights, DY, ffn.activation))


def run_on_mesh(
  cfg: DispatchConfig, job: Job, weights: Weights, ffn: Ffn, sizes: MeshConfig
) -> Result:
  """The result on a mesh of as many devices as its sizes say."""
  devices = jax.devices()[: math.prod(dataclasses.astuple(sizes))]
  with jax.set_mesh(make_mesh(sizes, devices)):
    return jax.tree.map(np.asarray, run(cfg, job, weights, DY, ffn.activation))


def kept_of(cfg: DispatchConfig, job: Job, num_experts: int, devices: int = 1) -> np.ndarray:
  """[T, K] bool: the copies that the oracle computes. Each device has buffers of its own."""
  ids = job.expert_ids.reshape(T, -1)
  if cfg.capacity_factor == 0:
    return ids < num_experts
  scores = np.concatenate([job.scores, np.zeros((B, S, 1))], -1)
  priority = np.take_along_axis(scores, job.expert_ids, -1).reshape(ids.shape)
  room = oracle.capacity_of(T // devices, num_experts, ids.shape[1], cfg.capacity_factor)
  kept = [
    oracle.kept_copies(own_ids, own_priority, num_experts, room, cfg.drop_by)
    for own_ids, own_priority in zip(np.split(ids, devices), np.split(priority, devices))
  ]
  return np.concatenate(kept)


def oracle_y(job: Job, weights: Weights, kept: np.ndarray | None, ffn: Ffn) -> np.ndarray:
  """[T, D]: what the oracle makes of the copies that are kept; None: of all of them."""
  ids = job.expert_ids.reshape(-1, job.expert_ids.shape[-1])
  x, w = job.x.reshape(len(ids), -1), job.weights.reshape(ids.shape)
  return oracle.moe(x, ids, w, jax.tree.leaves(weights), kept, ffn=ffn.oracle)


def check_gradients(
  gradients: tuple[Array, Array, Weights],
  job: Job,
  weights: Weights,
  kept: np.ndarray,
  dy: np.ndarray,
  ffn: Ffn,
  label: str,
) -> None:
  """Each gradient against the oracle's slope of y · dy along a random direction of its argument."""
  ids = job.expert_ids.reshape(len(kept), -1)

  def f(x: np.ndarray, w: np.ndarray, *projections: np.ndarray) -> float:
    x, w = x.reshape(len(kept), -1), w.reshape(ids.shape)
    y = oracle.moe(x, ids, w, projections, kept, ffn=ffn.oracle)
    return float((y * dy.reshape(y.shape)).sum())

  arguments = [np.asarray(a, np.float64) for a in jax.tree.leaves((job.x, job.weights, weights))]
  for i, gradient in enumerate(jax.tree.leaves(gradients)):

    def f_of_argument(a: np.ndarray, i: int = i) -> float:
      return f(*arguments[:i], a, *arguments[i + 1 :])

    direction = np.random.default_rng(i).normal(size=arguments[i].shape)
    np.testing.assert_allclose(
      (np.asarray(gradient, np.float64) * direction).sum(),
      oracle.slope(f_of_argument, arguments[i], direction),
      rtol=1e-5,
      atol=1e-5 * np.linalg.norm(gradient) + 1e-7,
      err_msg=f'{label}, argument {i}',
    )


def check_dispatch(
  cfg: DispatchConfig,
  num_experts: int,
  top_k: int,
  ffn: Ffn = PLAIN,
  mesh: MeshConfig | None = None,
) -> None:
  """A dispatcher against the oracle, on all the batches; with a mesh, on that."""
  weights = experts(num_experts, ffn.bias)
  devices = mesh.data * mesh.fsdp * mesh.expert if mesh else 1
  for label, job in jobs(num_experts, top_k).items():
    if mesh:
      result = run_on_mesh(cfg, job, weights, ffn, mesh)
    else:
      result = run_on_one_device(cfg, num_experts, top_k, label, ffn)
    kept, ids = kept_of(cfg, job, num_experts, devices), job.expert_ids.reshape(T, -1)
    want = oracle_y(job, weights, kept, ffn)
    np.testing.assert_allclose(result.y.reshape(T, D), want, rtol=1e-5, atol=2e-5, err_msg=label)
    copies = (ids < num_experts).sum()
    assert result.dropped == np.float32((copies - kept.sum()) / max(1, copies)), label
    check_gradients(result.gradients, job, weights, kept, DY, ffn, label)
    _, d_copy_weights, d_experts = result.gradients
    uncomputed = d_copy_weights.reshape(T, -1)[~kept]
    assert not uncomputed.any(), 'a copy that no expert computed has a gradient'
    for e in set(range(num_experts)) - set(ids[kept].tolist()):
      unseen = [d[e].any() for d in jax.tree.leaves(d_experts)]
      assert not any(unseen), 'an expert without a copy has a gradient'
