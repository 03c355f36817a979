"""Dispatchers on one device: against the oracle and each other, what is dropped, and causality."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS, Implementation
from moejax.moe.experts.weights import Biases, Weights
from tests.support.dispatch_oracle import (
  DROPLESS,
  DY,
  GPT_OSS,
  LIMIT,
  ROOMY,
  TIGHT,
  B,
  D,
  Ffn,
  S,
  T,
  check_dispatch,
  dispatch,
  experts,
  jobs,
  name_of,
  oracle_y,
  run,
  run_on_one_device,
)
from tests.support.quick import QUICK

SHAPES = list(itertools.product((4, 8), (1, 2)))
# Every dispatcher at every shape; the two sides of dropping at the shapes that differ most, to
# compile less.
JOBS = [(cfg, *shape) for shape in SHAPES for cfg in DROPLESS]
JOBS += [(cfg, 4, 2) for cfg in (*ROOMY, *TIGHT)] + [(cfg, 8, 1) for cfg in TIGHT[:2]]
FFNS = [Ffn(name, bias) for name in sorted(ACTIVATIONS) for bias in (False, True)]
configs = functools.partial(pytest.mark.parametrize, 'cfg', ids=name_of)


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
  """Or the tests above would say little: each bias, and each side of the clamp, moves y."""
  job, weights = jobs(4, 2)['plain'], experts(4, True)
  biases = weights.biases
  want = oracle_y(job, weights, None, GPT_OSS)
  for name in Biases._fields:
    without = weights._replace(biases=biases._replace(**{name: 0 * getattr(biases, name)}))
    assert np.abs(want - oracle_y(job, without, None, GPT_OSS)).max() > 0.1, name
  x = job.x.reshape(T, D)
  gate, up = x @ weights.gate[0] + biases.gate[0], x @ weights.up[0] + biases.up[0]
  assert (gate > LIMIT).any() and (gate < -LIMIT).any()
  assert (up > LIMIT).any() and (up < -LIMIT).any()


@pytest.mark.parametrize(('num_experts', 'top_k'), SHAPES)
def test_dispatchers_that_drop_nothing_agree(num_experts: int, top_k: int) -> None:
  agreeing = [*DROPLESS, *ROOMY] if (num_experts, top_k) == (4, 2) else DROPLESS
  for label in jobs(num_experts, top_k):
    first, *others = (run_on_one_device(cfg, num_experts, top_k, label) for cfg in agreeing)
    for other in others:
      assert other.dropped == 0
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), first, other
      )


def test_tight_buffers_do_drop() -> None:
  """Or the tests above would say nothing about which copies stay."""
  for cfg in TIGHT:
    assert 0 < run_on_one_device(cfg, 4, 2, 'plain').dropped < 0.7
  by_place, by_score = (run_on_one_device(cfg, 4, 2, 'plain').y for cfg in TIGHT[:2])
  assert np.abs(by_place - by_score).max() > 0.1


@configs([*DROPLESS, *ROOMY, *TIGHT])
def test_causal_unless_it_drops_by_score(cfg: DispatchConfig) -> None:
  """Later tokens with higher scores change nothing before them, unless they can evict."""
  job = jobs(4, 2)['plain']
  is_later = np.arange(T).reshape(B, S, 1) >= T // 2
  keener = job._replace(
    x=np.where(is_later, -job.x, job.x),
    scores=np.where(is_later, 1 + job.scores, job.scores),
    expert_ids=np.where(is_later, job.expert_ids[..., ::-1], job.expert_ids),
  )
  before, after = (
    np.asarray(run(cfg, j, experts(4), 0 * DY).y).reshape(T, D)[: T // 2] for j in (job, keener)
  )
  can_evict = cfg in TIGHT and cfg.drop_by == 'probs'
  assert np.array_equal(before, after) == (not can_evict)


@configs(DROPLESS)
def test_compute_dtype_is_that_of_x(cfg: DispatchConfig) -> None:
  job = jobs(4, 2)['padded']
  low = job._replace(x=jnp.asarray(job.x, jnp.bfloat16))
  weights: Weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), experts(4, GPT_OSS.bias))
  result = run.eval_shape(cfg, low, weights, low.x, GPT_OSS.activation)
  dx, d_copy_weights, d_experts = result.gradients
  dtypes = {a.dtype for a in jax.tree.leaves((result.y, dx, d_experts))}
  assert dtypes == {jnp.dtype(jnp.bfloat16)}
  assert d_copy_weights.dtype == jnp.float32
  compiled = jax.jit(dispatch, static_argnums=(0, 3), compiler_options=QUICK)
  y, _ = compiled(cfg, low, weights, GPT_OSS.activation)
  exact = run_on_one_device(cfg, 4, 2, 'padded', GPT_OSS).y
  assert 0 < np.abs(np.asarray(y, np.float32) - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize('implementation', [*IMPLEMENTATIONS])
def test_both_passes_are_by_the_implementation_that_is_asked_for(
  implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  taken = []

  def recording(passed: str, pass_: Callable) -> Callable:
    def run(*args: object) -> object:
      taken.append(passed)
      return pass_(*args)

    return run

  for name, row in IMPLEMENTATIONS.items():
    both = Implementation(*(recording(f'{name} {i}', way) for i, way in enumerate(row)))
    monkeypatch.setitem(IMPLEMENTATIONS, name, both)
  cfg = DispatchConfig(implementation=implementation)
  job, weights = jobs(4, 2)['plain'], experts(4)
  # Not `run`, whose cache may hold a trace of another implementation.
  jax.eval_shape(lambda *args: run.__wrapped__(cfg, *args), job, weights, DY)
  assert taken == [f'{implementation} 0', f'{implementation} 1']


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
    (
      {'implementation': 'cutlass'},
      "implementation='cutlass' is not one of ['auto', 'blocked', 'gathered', 'ragged_dot', 't",
    ),
    (
      {'dispatcher': 'dense_matmul', 'implementation': 'blocked'},
      "implementation='blocked' is of sparse_matmul: with dispatcher='dense_matmul' use 'auto'",
    ),
  ],
)
def test_a_dispatch_that_cannot_be_is_one_clear_error(
  fields: dict[str, str | float], named: str
) -> None:
  with pytest.raises(ConfigError) as error:
    DispatchConfig(**fields)
  assert len(error.value.problems) == 1 and error.value.problems[0].startswith(named)
