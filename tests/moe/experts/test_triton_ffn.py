"""The kernels for NVIDIA GPUs, interpreted on CPU: against float64, over shapes drawn at random.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token, N copies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS, grouped_ffn
from moejax.moe.experts.residuals import FfnGradients, Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from tests.support.kernel_interpreter import interpret_kernels
from tests.support.quick import QUICK


class Drawn(NamedTuple):
  """A problem, its arrays rounded to the dtype."""

  x: np.ndarray
  dy: np.ndarray
  ids: np.ndarray
  copy_weights: np.ndarray
  weights: Weights
  activation: str


LIMIT = 1.5  # of the clamped: a good part of the pre-activations are beyond it
# seed -> what is unusual about its routing; the shapes are drawn.
ROUTINGS = ('even', 'skewed', 'all to one', 'half unassigned', 'none assigned', 'few tokens')


def draw(seed: int, dtype: jnp.dtype) -> Drawn:
  """Random shapes, most of them no multiple of a tile, with each routing in turn."""
  rng = np.random.default_rng(seed)
  routing = ROUTINGS[seed % len(ROUTINGS)]
  num_experts, top_k = int(rng.integers(2, 7)), int(rng.integers(1, 3))
  tokens = int(rng.integers(1, 4)) if routing == 'few tokens' else int(rng.integers(40, 180))
  d_model, width = (int(n) for n in rng.integers(3, 150, 2))

  def normal(*shape: int) -> np.ndarray:
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
    return np.asarray(jnp.asarray(scale * rng.normal(size=shape), dtype))

  odds = np.ones(num_experts) if routing != 'skewed' else 4.0 ** -np.arange(num_experts)
  gumbel = rng.gumbel(size=(tokens, num_experts))
  ids = np.argsort(-np.log(odds) - gumbel, axis=1)[:, :top_k].astype(np.int32)
  if routing == 'all to one':
    ids = np.where(np.arange(top_k) == 0, num_experts - 1, num_experts) + 0 * ids
  elif routing == 'half unassigned':
    ids[rng.random(ids.shape) < 0.5] = num_experts
  elif routing == 'none assigned':
    ids[:] = -1
  has_bias = seed % 2 == 1
  weights = Weights(
    gate=normal(num_experts, d_model, width),
    up=normal(num_experts, d_model, width),
    down=normal(num_experts, width, d_model),
    biases=Biases(
      normal(num_experts, width), normal(num_experts, width), normal(num_experts, d_model)
    )
    if has_bias
    else Biases(),
  )
  x, dy = normal(tokens, d_model), normal(tokens, d_model)
  copy_weights = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
  name = 'clamped_swiglu' if has_bias else 'swiglu'
  return Drawn(x, dy, ids, copy_weights, weights, name)


def in_float64(drawn: Drawn, limit: float) -> tuple[np.ndarray, FfnGradients]:
  """One copy after the other, in NumPy, from the definition."""
  x, dy = drawn.x.astype(np.float64), drawn.dy.astype(np.float64)
  stacks = jax.tree.map(lambda a: np.asarray(a, np.float64), drawn.weights)
  biases = stacks.biases
  y, dx = np.zeros_like(x), np.zeros_like(x)
  d_weights = jax.tree.map(np.zeros_like, stacks)
  d_copy_weights = []
  num_experts = stacks.gate.shape[0]
  flat_ids = np.where((drawn.ids >= 0) & (drawn.ids < num_experts), drawn.ids, num_experts)
  places = np.argsort(flat_ids.reshape(-1), kind='stable')
  top_k = drawn.ids.shape[1]
  for place in places:
    t, e = place // top_k, flat_ids.reshape(-1)[place]
    if e == num_experts:
      d_copy_weights.append(0.0)
      continue
    w = float(drawn.copy_weights.reshape(-1)[place])
    gate, up = x[t] @ stacks.gate[e], x[t] @ stacks.up[e]
    down_bias = 0.0
    if biases.gate is not None:
      gate, up, down_bias = gate + biases.gate[e], up + biases.up[e], biases.down[e]
    hidden, slope_gate, slope_up = slopes(drawn.activation, gate, up, limit)
    out = hidden @ stacks.down[e] + down_bias
    y[t] += w * out
    d_copy_weights.append(out @ dy[t])
    d_hidden = w * (stacks.down[e] @ dy[t])
    d_gate, d_up = d_hidden * slope_gate, d_hidden * slope_up
    dx[t] += stacks.gate[e] @ d_gate + stacks.up[e] @ d_up
    d_weights.gate[e] += np.outer(x[t], d_gate)
    d_weights.up[e] += np.outer(x[t], d_up)
    d_weights.down[e] += np.outer(w * hidden, dy[t])
    if biases.gate is not None:
      d_weights.biases.gate[e] += d_gate
      d_weights.biases.up[e] += d_up
      d_weights.biases.down[e] += w * dy[t]
  return y, FfnGradients(dx, np.array(d_copy_weights), d_weights)


def slopes(
  activation: str, gate: np.ndarray, up: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The hidden layer, and its derivatives to gate and to up."""
  if activation == 'swiglu':
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, up * s * (1 + gate * (1 - s)), gate * s
  cut_gate, cut_up = np.minimum(gate, limit), np.clip(up, -limit, limit)
  s = 1 / (1 + np.exp(-1.702 * cut_gate))
  d_gate = (cut_up + 1) * s * (1 + 1.702 * cut_gate * (1 - s)) * (gate < limit)
  return (cut_up + 1) * cut_gate * s, d_gate, cut_gate * s * (np.abs(up) < limit)


def marked(seed: int, dtype: str, allowed: float, limit: float) -> object:
  """A case as a parameter of a test; all but two are slow, since each is compiled."""
  marks = () if dtype == 'float32' and seed < 2 else pytest.mark.slow
  return pytest.param(seed, jnp.dtype(dtype), allowed, limit, marks=marks, id=f'{dtype}-{seed}')


@pytest.mark.parametrize(
  ('seed', 'dtype', 'allowed', 'limit'),
  [
    *(marked(seed, 'float32', 3e-6, LIMIT) for seed in range(8)),
    # Nothing is cut: a pre-activation that rounding carries over the limit has another slope.
    *(marked(seed, 'bfloat16', 1.5e-2, 100.0) for seed in range(6)),
  ],
)
def test_values_and_gradients_are_those_of_float64(
  seed: int, dtype: jnp.dtype, allowed: float, limit: float
) -> None:
  """Each array's worst deviation, as a part of its largest entry: a rounding or two."""
  check_against_float64(draw(seed, dtype), allowed, limit)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [2, 3, 5])
def test_nothing_is_relied_on_that_a_kernel_did_not_write(
  seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What was not stored, and what lies past the end of an array, is NaN or far off."""
  kernels = interpret_kernels(monkeypatch)
  check_against_float64(draw(seed, jnp.dtype('float32')), 3e-6, LIMIT)
  assert len({*kernels}) == 6


def check_against_float64(drawn: Drawn, allowed: float, limit: float) -> None:
  """Both passes of the row of GPUs, against one copy after the other."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(x: Array, w: Array, weights: Weights, dy: Array) -> tuple[Array, FfnGradients]:
    copies = sort_copies(jnp.asarray(drawn.ids), w, weights.gate.shape[0])
    forward, backward = IMPLEMENTATIONS['triton']
    activation = ACTIVATIONS[drawn.activation](limit)
    y, pre_activations = forward(x, copies, weights, activation)
    return y, backward(Residuals(x, copies, weights, pre_activations), activation, dy)

  got = jax.tree.leaves(run(drawn.x, drawn.copy_weights, drawn.weights, drawn.dy))
  want = jax.tree.leaves(in_float64(drawn, limit))
  assert len(got) == len(want)
  for found, right in zip(got, want):
    assert found.shape == right.shape
    largest = np.abs(right).max() if right.size else 0.0
    deviation = np.abs(np.asarray(found, np.float64) - right).max()
    assert deviation <= allowed * largest, (deviation / max(largest, 1e-30), found.shape)


def test_the_row_of_gpus_under_scan_and_remat_is_the_row_of_cpus(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Three layers by `scan`, recomputed in the backward pass, two micro-batches added up."""
  rng = np.random.default_rng(0)
  layers, tokens, d_model, width, num_experts = 3, 24, 16, 24, 4
  stacks = [
    rng.normal(size=(layers, num_experts, *shape)).astype(np.float32) / 4
    for shape in ((d_model, width), (d_model, width), (width, d_model))
  ]
  x = rng.normal(size=(2, tokens, d_model)).astype(np.float32)
  ids = rng.integers(0, num_experts + 1, (tokens, 2)).astype(np.int32)
  ids[:, 1] = (ids[:, 0] + 1) % num_experts
  w = rng.uniform(size=ids.shape).astype(np.float32)

  def loss(stacks: list[Array], x: Array) -> Array:
    def layer(x: Array, weights: list[Array]) -> tuple[Array, None]:
      copies = sort_copies(jnp.asarray(ids), jnp.asarray(w), num_experts)
      return x + grouped_ffn(x, copies, Weights(*weights), ACTIVATIONS['swiglu'](0.0)), None

    return jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, stacks)[0]).sum()

  def run(name: str) -> list[Array]:
    monkeypatch.setattr('moejax.moe.experts.grouped_ffn.best_implementation', lambda copies: name)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def accumulated(stacks: list[Array], x: Array) -> list[Array]:
      sums = jax.tree.map(jnp.zeros_like, stacks)

      def add(sums: list[Array], x: Array) -> tuple[list[Array], None]:
        return jax.tree.map(jnp.add, sums, jax.grad(loss)(stacks, x)), None

      return jax.lax.scan(add, sums, x)[0]

    return accumulated(stacks, x)

  for got, want in zip(run('triton'), run('blocked')):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
