"""Dispatchers against the oracle and each other: outputs, gradients, what is dropped, and causality."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.config import ConfigError
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DROP_BY, DispatchConfig
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import BEST_BY_PLATFORM, IMPLEMENTATIONS, best_implementation
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.moe.routing import Routing
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support import oracle
from tests.support.emulated_exchange import emulate
from tests.support.quick import QUICK

B, S, D, F = 4, 5, 6, 4
T = B * S
DY = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
SHAPES = list(itertools.product((4, 8), (1, 2)))
DROPLESS = [DispatchConfig(name) for name in sorted(DISPATCHERS)]
ROOMY = [
  DispatchConfig('dense_matmul', 8.0, drop_by) for drop_by in DROP_BY
]  # C = N: room for all copies
TIGHT = [
  DispatchConfig('dense_matmul', factor, drop_by) for factor in (0.45, 1.0) for drop_by in DROP_BY
]
EXCHANGED = [
  DROPLESS[0],
  *(DispatchConfig('sparse_matmul', exchange=name) for name in ('gather', 'ragged')),
]
# Every dispatcher at every shape; the two sides of dropping at the shapes that differ most, to compile less.
JOBS = [(cfg, *shape) for shape in SHAPES for cfg in DROPLESS]
JOBS += [(cfg, 4, 2) for cfg in (*ROOMY, *TIGHT)] + [(cfg, 8, 1) for cfg in TIGHT[:2]]
LIMIT = 1.5  # of the clamped: a good part of the pre-activations are beyond it


class Ffn(NamedTuple):
  activation: str
  bias: bool

  def __str__(self) -> str:
    return self.activation + '-biased' * self.bias

  def oracle(self, *args: np.ndarray) -> np.ndarray:
    return OF_ORACLE[self.activation](*args)


OF_ORACLE = {
  'swiglu': oracle.swiglu,
  'clamped_swiglu': functools.partial(oracle.clamped_swiglu, limit=LIMIT),
}
PLAIN, GPT_OSS = Ffn('swiglu', False), Ffn('clamped_swiglu', True)
FFNS = [Ffn(name, bias) for name in sorted(ACTIVATIONS) for bias in (False, True)]


def name_of(value: object) -> str:
  return (
    '-'.join(map(str, dataclasses.astuple(value)))
    if isinstance(value, DispatchConfig)
    else str(value)
  )


configs = functools.partial(pytest.mark.parametrize, 'cfg', ids=name_of)


class Job(NamedTuple):
  x: np.ndarray  # [B, S, D]
  expert_ids: np.ndarray  # [B, S, K], E for a token that does not count
  scores: np.ndarray  # [B, S, E]
  weights: np.ndarray  # [B, S, K]


@functools.cache
def experts(num_experts: int, bias: bool = False) -> Weights:
  rng = np.random.default_rng(num_experts)
  wide, narrow, *biases = (
    rng.normal(size=(count, num_experts, *shape)).astype(np.float32)
    for count, *shape in ((2, D, F), (1, F, D), (2, F), (1, D))
  )
  return Weights(*wide, *narrow, Biases(*biases[0], *biases[1]) if bias else Biases())


@functools.cache
def jobs(num_experts: int, top_k: int) -> dict[str, Job]:
  """Batches by what is unusual about who goes where."""
  rng = np.random.default_rng(10 * num_experts + top_k)
  ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(T)], np.int32).reshape(
    B, S, top_k
  )
  job = Job(
    rng.normal(size=(B, S, D)).astype(np.float32),
    ids,
    rng.dirichlet(np.ones(num_experts), (B, S)).astype(np.float32),
    rng.normal(size=(B, S, top_k)).astype(np.float32),
  )
  counts = np.arange(S) < np.array([[5], [2], [0], [4]])
  unchosen = np.concatenate([1 + ids[..., :1] % 2, 3 + 0 * ids[..., 1:]], -1)  # 1 or 2, and 3
  return {
    'plain': job,
    'padded': job._replace(expert_ids=np.where(counts[..., None], ids, num_experts)),
    'all to the same': job._replace(
      expert_ids=np.arange(top_k, dtype=np.int32) + 0 * ids
    ),  # and to one device
    'one unchosen': job._replace(expert_ids=unchosen),
    'tied scores': job._replace(scores=np.full((B, S, num_experts), 1 / num_experts, np.float32)),
    'single token': job._replace(
      expert_ids=np.where(np.arange(T).reshape(B, S, 1) == 7, ids, num_experts)
    ),
    'nothing': job._replace(expert_ids=np.full_like(ids, num_experts)),
  }


def dispatch(
  cfg: DispatchConfig, job: Job, weights: Weights, activation: str
) -> tuple[Array, Array]:
  routing = Routing(
    job.scores,
    job.scores,
    job.scores,
    job.expert_ids,
    job.weights,
    best_ids=job.expert_ids,
    margin=job.weights[..., 0],
    likely=job.scores,
    router=job.scores[0],
  )
  return DISPATCHERS[cfg.dispatcher](job.x, routing, weights, ACTIVATIONS[activation](LIMIT), cfg)


@functools.partial(jax.jit, static_argnames=('cfg', 'activation'), compiler_options=QUICK)
def run(
  cfg: DispatchConfig, job: Job, weights: Weights, dy: Array, activation: str = 'swiglu'
) -> tuple[Array, Array, tuple[Array, Array, Weights]]:
  """y, the dropped fraction, and the gradients of y · dy to x, to the routing weights and to the experts."""

  def f(x: Array, w: Array, weights: Weights) -> tuple[Array, Array]:
    return dispatch(cfg, job._replace(x=x, weights=w), weights, activation)

  y, pull, dropped = jax.vjp(f, job.x, job.weights, weights, has_aux=True)
  return y, dropped, pull(dy)


@functools.cache
def ran(
  cfg: DispatchConfig, num_experts: int, top_k: int, label: str, ffn: Ffn = PLAIN
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, Weights]]:
  job, weights = jobs(num_experts, top_k)[label], experts(num_experts, ffn.bias)
  return jax.tree.map(np.asarray, run(cfg, job, weights, DY, ffn.activation))


def kept_of(cfg: DispatchConfig, job: Job, num_experts: int, devices: int = 1) -> np.ndarray:
  """[T, K] bool: the copies that the oracle computes. Each of the devices has buffers of its own."""
  ids = job.expert_ids.reshape(T, -1)
  if cfg.capacity_factor == 0:
    return ids < num_experts
  scores = np.concatenate([job.scores, np.zeros((B, S, 1))], -1)
  priority = np.take_along_axis(scores, job.expert_ids, -1).reshape(ids.shape)
  room = oracle.capacity_of(T // devices, num_experts, ids.shape[1], cfg.capacity_factor)
  return np.concatenate(
    [
      oracle.kept_copies(*own, num_experts, room, cfg.drop_by)
      for own in zip(np.split(ids, devices), np.split(priority, devices))
    ]
  )


def check_gradients(
  gradients: tuple[Array, Array, Weights],
  job: Job,
  weights: Weights,
  kept: np.ndarray,
  dy: np.ndarray,
  ffn: Ffn,
  label: str,
) -> None:
  """Each gradient against the slope of the oracle's y · dy along a random direction of that argument."""
  ids = job.expert_ids.reshape(len(kept), -1)

  def f(x: np.ndarray, w: np.ndarray, *projections: np.ndarray) -> float:
    y = oracle.moe(
      x.reshape(len(kept), -1), ids, w.reshape(ids.shape), projections, kept, ffn=ffn.oracle
    )
    return float((y * dy.reshape(y.shape)).sum())

  arguments = [np.asarray(a, np.float64) for a in jax.tree.leaves((job.x, job.weights, weights))]
  for i, gradient in enumerate(jax.tree.leaves(gradients)):
    direction = np.random.default_rng(i).normal(size=arguments[i].shape)
    slope = oracle.slope(
      lambda a, i=i: f(*arguments[:i], a, *arguments[i + 1 :]), arguments[i], direction
    )
    np.testing.assert_allclose(
      (np.asarray(gradient, np.float64) * direction).sum(),
      slope,
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
  """Against the oracle, on all the batches; with a mesh, on that."""
  weights, devices = (
    experts(num_experts, ffn.bias),
    mesh.data * mesh.fsdp * mesh.expert if mesh else 1,
  )
  for label, job in jobs(num_experts, top_k).items():
    y, dropped, gradients = (
      on_mesh(cfg, job, weights, ffn, mesh) if mesh else ran(cfg, num_experts, top_k, label, ffn)
    )
    kept, ids = kept_of(cfg, job, num_experts, devices), job.expert_ids.reshape(T, -1)
    want = oracle.moe(
      job.x.reshape(T, D),
      ids,
      job.weights.reshape(ids.shape),
      jax.tree.leaves(weights),
      kept,
      ffn=ffn.oracle,
    )
    np.testing.assert_allclose(y.reshape(T, D), want, rtol=1e-5, atol=2e-5, err_msg=label)
    copies = (ids < num_experts).sum()
    assert dropped == np.float32((copies - kept.sum()) / max(1, copies)), label
    check_gradients(gradients, job, weights, kept, DY, ffn, label)
    assert not gradients[1].reshape(T, -1)[~kept].any(), (
      'a copy that nobody computed has a gradient'
    )
    for e in set(range(num_experts)) - set(ids[kept].tolist()):
      assert not any(g[e].any() for g in jax.tree.leaves(gradients[2])), (
        'an expert that saw nobody has a gradient'
      )


@pytest.mark.parametrize(('cfg', 'num_experts', 'top_k'), JOBS, ids=name_of)
def test_outputs_gradients_and_drops_are_the_oracles(
  cfg: DispatchConfig, num_experts: int, top_k: int
) -> None:
  check_dispatch(cfg, num_experts, top_k)


@configs([*DROPLESS, TIGHT[1]])
def test_experts_of_gpt_oss_are_the_oracles(cfg: DispatchConfig) -> None:
  check_dispatch(cfg, 4, 2, GPT_OSS)


@pytest.mark.slow
@pytest.mark.parametrize('ffn', FFNS[1:], ids=name_of)
@pytest.mark.parametrize(('cfg', 'num_experts', 'top_k'), JOBS, ids=name_of)
def test_experts_of_any_kind_are_the_oracles(
  cfg: DispatchConfig, num_experts: int, top_k: int, ffn: Ffn
) -> None:
  check_dispatch(cfg, num_experts, top_k, ffn)


def test_the_kinds_of_experts_differ() -> None:
  """Or the tests above would say little: each bias, and the clamping on every side, moves the output."""
  job, weights = jobs(4, 2)['plain'], experts(4, True)
  x = job.x.reshape(T, D)

  def output(ffn: Ffn, weights: Weights) -> np.ndarray:
    ids = job.expert_ids.reshape(T, -1)
    return oracle.moe(
      x, ids, job.weights.reshape(ids.shape), jax.tree.leaves(weights), ffn=ffn.oracle
    )

  for name in Biases._fields:
    without = weights._replace(
      biases=weights.biases._replace(**{name: 0 * getattr(weights.biases, name)})
    )
    assert np.abs(output(GPT_OSS, weights) - output(GPT_OSS, without)).max() > 0.1, name
  gate, up = (
    x @ w[0] + b[0]
    for w, b in ((weights.gate, weights.biases.gate), (weights.up, weights.biases.up))
  )
  assert (
    (gate > LIMIT).any() and (gate < -LIMIT).any() and (up > LIMIT).any() and (up < -LIMIT).any()
  )


@pytest.mark.parametrize(('num_experts', 'top_k'), SHAPES)
def test_dispatchers_that_drop_nothing_agree(num_experts: int, top_k: int) -> None:
  for label in jobs(num_experts, top_k):
    first, *others = (
      ran(cfg, num_experts, top_k, label)
      for cfg in (DROPLESS if (num_experts, top_k) != (4, 2) else [*DROPLESS, *ROOMY])
    )
    for other in others:
      assert other[1] == 0
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), first, other
      )


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
  keener = job._replace(
    x=np.where(later, -job.x, job.x),
    scores=np.where(later, 1 + job.scores, job.scores),
    expert_ids=np.where(later, job.expert_ids[..., ::-1], job.expert_ids),
  )
  before, after = (
    np.asarray(run(cfg, j, experts(4), 0 * DY)[0]).reshape(T, D)[: T // 2] for j in (job, keener)
  )
  assert np.array_equal(before, after) == (cfg not in TIGHT or cfg.drop_by != 'probs')


@pytest.mark.parametrize('implementation', sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize(
  ('to_one', 'ffn'), [(False, PLAIN), (True, PLAIN), (False, GPT_OSS), (True, GPT_OSS)], ids=name_of
)
def test_grouped_ffn_over_many_blocks(implementation: str, to_one: bool, ffn: Ffn) -> None:
  """More copies than a block has rows, blocks that reach into another expert's rows, copies of nobody."""
  tokens, num_experts = 90, 4
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(2, tokens, D)).astype(np.float32)
  ids = np.array([rng.permutation(num_experts)[:2] for _ in range(tokens)], np.int32)
  ids = (
    np.where(np.arange(2) == 0, 2, -1) + 0 * ids if to_one else np.where(ids == 1, num_experts, ids)
  )
  kept = (ids >= 0) & (ids < num_experts)
  job, weights = (
    Job(x, ids, x, rng.normal(size=ids.shape).astype(np.float32)),
    experts(num_experts, ffn.bias),
  )
  activation = ACTIVATIONS[ffn.activation](LIMIT)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(
    x: Array, w: Array, weights: Weights, dy: Array
  ) -> tuple[Array, tuple[Array, Array, Weights], Array]:
    copies, unsort = jax.vjp(lambda w: sort_copies(jnp.asarray(ids), w, num_experts), w)
    forward, backward = IMPLEMENTATIONS[implementation]
    y, gate, up = forward(x, copies, weights, activation)
    dx, d_copies, d_weights = backward(x, copies, weights, activation, gate, up, dy)
    none = [np.zeros(n, jax.dtypes.float0) for n in (ids.size, num_experts)]
    (dw,) = unsort(copies._replace(tokens=none[0], weights=d_copies, load=none[1]))
    return y, (dx, dw, d_weights), copies.load

  y, gradients, load = both(x, job.weights, weights, dy)
  np.testing.assert_array_equal(load, [(ids == e).sum() for e in range(num_experts)])
  want = oracle.moe(x, ids, job.weights, jax.tree.leaves(weights), kept, ffn=ffn.oracle)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5)
  check_gradients(gradients, job, weights, kept, dy, ffn, implementation)


def test_few_copies_are_gathered_but_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
  def of(tokens: int, top_k: int) -> str:
    ids = jnp.zeros((tokens, top_k), jnp.int32)
    return best_implementation(sort_copies(ids, ids.astype(jnp.float32), 8))

  assert [of(1, 2), of(2, 2), of(1, 5), of(8, 2)] == ['gathered', 'gathered', 'blocked', 'blocked']
  monkeypatch.setattr('moejax.moe.experts.grouped_ffn.platform', lambda: 'tpu')
  assert of(1, 2) == of(8, 2) == 'ragged_dot'


@configs(DROPLESS)
def test_compute_dtype_is_that_of_x(cfg: DispatchConfig) -> None:
  job = jobs(4, 2)['padded']
  low = job._replace(x=jnp.asarray(job.x, jnp.bfloat16))
  weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), experts(4, GPT_OSS.bias))
  y, _, gradients = run.eval_shape(cfg, low, weights, low.x, GPT_OSS.activation)
  assert {a.dtype for a in jax.tree.leaves((y, gradients[0], gradients[2]))} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert gradients[1].dtype == jnp.float32
  y = jax.jit(dispatch, static_argnums=(0, 3), compiler_options=QUICK)(
    cfg, low, weights, GPT_OSS.activation
  )[0]
  exact = ran(cfg, 4, 2, 'padded', GPT_OSS)[0]
  assert 0 < np.abs(np.asarray(y, np.float32) - exact).max() < 0.03 * np.abs(exact).max()


def on_mesh(
  cfg: DispatchConfig, job: Job, weights: Weights, ffn: Ffn, sizes: MeshConfig
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, Weights]]:
  with jax.set_mesh(make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])):
    return jax.tree.map(np.asarray, run(cfg, job, weights, DY, ffn.activation))


@pytest.mark.parametrize(
  ('cfg', 'ffn'),
  [
    *((cfg, PLAIN) for cfg in (*EXCHANGED, ROOMY[0])),
    *((cfg, GPT_OSS) for cfg in (*EXCHANGED, TIGHT[1])),
  ],
  ids=name_of,
)
def test_a_mesh_is_the_oracles_too(
  cfg: DispatchConfig, ffn: Ffn, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Experts over two devices, their hidden layer over two, rows over two times two; drops are each device's own."""
  emulate(monkeypatch)
  check_dispatch(cfg, 4, 2, ffn, MeshConfig(data=2, expert=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [MeshConfig(2, 2), MeshConfig(1, 2, 1, 4), MeshConfig(1, 1, 4, 2), MeshConfig(1, 2, 2, 2)],
  ids=str,
)
@configs([*EXCHANGED, *ROOMY, *TIGHT])
def test_any_mesh_is_the_oracles(
  cfg: DispatchConfig, sizes: MeshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  emulate(monkeypatch)
  check_dispatch(cfg, 4, 2, GPT_OSS, sizes)


@pytest.mark.slow
@pytest.mark.parametrize('ffn', [PLAIN, GPT_OSS], ids=name_of)
def test_a_mesh_changes_nothing_where_there_is_a_grouped_matmul(
  ffn: Ffn, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As on a TPU."""
  want, args = (
    ran(DROPLESS[1], 4, 2, 'padded', ffn),
    (jobs(4, 2)['padded'], experts(4, ffn.bias), DY),
  )
  monkeypatch.setitem(BEST_BY_PLATFORM, 'cpu', 'ragged_dot')
  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
    anew = jax.jit(
      lambda *args: run.__wrapped__(DROPLESS[1], *args, ffn.activation), compiler_options=QUICK
    )
    assert 'ragged_dot' in str(anew.trace(*args).jaxpr)
    got = jax.tree.map(np.asarray, anew(*args))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'dispatcher': 'dense'}, "dispatcher='dense' is not one of"),
    ({'capacity_factor': -1.0}, 'capacity_factor=-1.0'),
    ({'dispatcher': 'sparse_matmul', 'capacity_factor': 1.0}, 'capacity_factor=1.0 has no meaning'),
    ({'drop_by': 'score'}, "drop_by='score' is not one of"),
    (
      {'exchange': 'rag'},
      "exchange='rag' with dispatcher='sparse_matmul', capacity_factor=0.0: use one of ['auto', 'g",
    ),
    ({'exchange': 'all_to_all'}, "exchange='all_to_all' with dispatcher='sparse_matmul'"),
    (
      {'dispatcher': 'dense_matmul', 'exchange': 'ragged'},
      "exchange='ragged' with dispatcher='dense_matmul'",
    ),
    (
      {'dispatcher': 'dense_matmul', 'capacity_factor': 1.0, 'exchange': 'gather'},
      "exchange='gather' with dispatcher=",
    ),
  ],
)
def test_a_dispatch_that_cannot_be_is_one_clear_error(
  fields: dict[str, str | float], named: str
) -> None:
  with pytest.raises(ConfigError) as error:
    DispatchConfig(**fields)
  assert len(error.value.problems) == 1 and error.value.problems[0].startswith(named)
