"""The grouped FFN by each implementation: against the oracle, and which of them is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.experts.blocked_ffn import block_sizes
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS, best_implementation
from moejax.moe.experts.residuals import Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from tests.support.dispatch_oracle import (
  GPT_OSS,
  LIMIT,
  PLAIN,
  D,
  Ffn,
  Job,
  check_gradients,
  experts,
  name_of,
  oracle_y,
)
from tests.support.quick import QUICK


@pytest.mark.parametrize('implementation', sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize(
  ('to_one', 'ffn'), [(False, PLAIN), (True, PLAIN), (False, GPT_OSS), (True, GPT_OSS)], ids=name_of
)
def test_grouped_ffn_over_many_blocks(implementation: str, to_one: bool, ffn: Ffn) -> None:
  """Also blocks that reach into another expert's rows, and unassigned copies."""
  tokens, num_experts = 90, 4
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(2, tokens, D)).astype(np.float32)
  ids = np.array([rng.permutation(num_experts)[:2] for _ in range(tokens)], np.int32)
  if to_one:
    ids = np.where(np.arange(2) == 0, 2, -1) + 0 * ids
  else:
    ids = np.where(ids == 1, num_experts, ids)
  kept = (ids >= 0) & (ids < num_experts)
  job = Job(x, ids, x, rng.normal(size=ids.shape).astype(np.float32))
  weights = experts(num_experts, ffn.bias)
  activation = ACTIVATIONS[ffn.activation](LIMIT)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(
    x: Array, w: Array, weights: Weights, dy: Array
  ) -> tuple[Array, tuple[Array, Array, Weights], Array]:
    copies, unsort = jax.vjp(lambda w: sort_copies(jnp.asarray(ids), w, num_experts), w)
    forward, backward = IMPLEMENTATIONS[implementation]
    y, pre_activations = forward(x, copies, weights, activation)
    gradients = backward(Residuals(x, copies, weights, pre_activations), activation, dy)
    no_tokens, no_load = (np.zeros(n, jax.dtypes.float0) for n in (ids.size, num_experts))
    d_copies = copies._replace(tokens=no_tokens, weights=gradients.copy_weights, load=no_load)
    (dw,) = unsort(d_copies)
    return y, (gradients.x, dw, gradients.weights), copies.load

  y, gradients, load = both(x, job.weights, weights, dy)
  np.testing.assert_array_equal(load, [(ids == e).sum() for e in range(num_experts)])
  np.testing.assert_allclose(y, oracle_y(job, weights, kept, ffn), rtol=1e-5, atol=2e-5)
  check_gradients(gradients, job, weights, kept, dy, ffn, implementation)


# Copies of each expert: none, a part of a block, whole blocks, and a row more or less.
LOADS = [0, 1, 31, 33, 127, 128, 129, 255, 256, 257, 384, 385]


@pytest.mark.parametrize('implementation', ['blocked', 'ragged_dot'])
def test_blocks_of_every_remainder_and_of_several_whole_ones(implementation: str) -> None:
  """Linear experts of width 1, whose sums over copies are short formulas; integers, so exact.

  With gate = up = down = 1 and activation gate + up an expert gives 2 w x; no weight is 1.
  """
  ids = np.repeat(np.arange(len(LOADS), dtype=np.int32), LOADS)[:, None]
  rng = np.random.default_rng(0)
  x, w, dy = (rng.integers(1, 5, ids.shape).astype(np.float32) for _ in range(3))
  w += 1
  ones = np.ones((len(LOADS), 1, 1), np.float32)
  bias = ones[..., 0]

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(x: Array, w: Array, weights: Weights, dy: Array) -> tuple:
    copies = sort_copies(jnp.asarray(ids), w, len(LOADS))
    forward, backward = IMPLEMENTATIONS[implementation]
    y, pre = forward(x, copies, weights, jnp.add)
    return y, backward(Residuals(x, copies, weights, pre), jnp.add, dy)

  weights = Weights(ones, ones, ones, Biases(bias, bias, bias))
  y, gradients = jax.tree.map(np.asarray, both(x, w, weights, dy))
  hidden = 2 * x + 2  # (x + 1) + (x + 1)
  np.testing.assert_array_equal(y, w * (hidden + 1))
  np.testing.assert_array_equal(gradients.x, 2 * w * dy)
  np.testing.assert_array_equal(gradients.copy_weights, ((hidden + 1) * dy)[:, 0])

  def sums(values: np.ndarray) -> np.ndarray:
    return np.bincount(ids[:, 0], values[:, 0], len(LOADS))

  found = gradients.weights
  for got in (found.gate, found.up):
    np.testing.assert_array_equal(got[:, 0, 0], sums(w * x * dy))
  np.testing.assert_array_equal(found.down[:, 0, 0], sums(w * hidden * dy))
  for got in found.biases:
    np.testing.assert_array_equal(got[:, 0], sums(w * dy))


def test_few_copies_are_gathered_but_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
  def best(tokens: int, top_k: int) -> str:
    ids = jnp.zeros((tokens, top_k), jnp.int32)
    return best_implementation(sort_copies(ids, ids.astype(jnp.float32), 8))

  assert [best(1, 2), best(2, 2)] == ['gathered', 'gathered']
  assert [best(1, 5), best(8, 2)] == ['blocked', 'blocked']
  monkeypatch.setattr('moejax.moe.experts.grouped_ffn.platform', lambda: 'tpu')
  assert best(1, 2) == best(8, 2) == 'ragged_dot'


def test_blocks_are_no_larger_than_what_experts_have() -> None:
  assert block_sizes(num_copies=20, num_experts=4) == (32,)
  assert block_sizes(num_copies=33, num_experts=4) == (32, 64)
  assert block_sizes(num_copies=1000, num_experts=4) == (32, 64, 128)
  assert block_sizes(num_copies=1024, num_experts=4) == (32, 64, 128, 256)
