"""Rotary positions against the oracle, and what they are for: only the distance of two tokens counts."""
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.config import ConfigError
from moejax.rope import RopeConfig, inverse_frequencies, rotate

B, S, H, D = 2, 5, 3, 8
CFG = RopeConfig(theta=100.0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, S, H, D)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 0, 1], [7, 8, 300, 4000, 0]], np.int32)
run = jax.jit(rotate, static_argnums=2)


@pytest.mark.parametrize('theta', [100.0, 10_000.0])
def test_values_are_the_oracles(theta: float) -> None:
  cfg = RopeConfig(theta)
  # An angle of 4000 has a spacing of 2^-12 in float32.
  np.testing.assert_allclose(run(X, POSITIONS, cfg), oracle.rope(X, POSITIONS, theta), atol=2e-3)
  first = X[:1], POSITIONS[:1]
  np.testing.assert_allclose(run(*first, cfg), oracle.rope(*first, theta), atol=1e-6)


def test_frequencies() -> None:
  np.testing.assert_allclose(inverse_frequencies(4, CFG), [1.0, 0.1], rtol=1e-6)
  assert inverse_frequencies(D, CFG).dtype == jnp.float32


def test_gradient_turns_back() -> None:
  """A rotation's transpose is its inverse: the gradient of y · dy is dy turned by minus the positions."""
  dy = RNG.normal(size=X.shape).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda x: (rotate(x, POSITIONS, CFG) * dy).sum()))(X)
  np.testing.assert_allclose(gradient, oracle.rope(dy, -POSITIONS, CFG.theta), atol=2e-3)


def test_products_depend_on_the_distance_alone() -> None:
  q, k = X[:1, :1], X[1:, :1]

  def product(at_q: int, at_k: int) -> np.ndarray:
    turned = [run(a, np.array([[at]], np.int32), CFG) for a, at in ((q, at_q), (k, at_k))]
    return np.asarray((turned[0] * turned[1]).sum(-1))

  np.testing.assert_allclose(product(9, 4), product(25, 20), atol=1e-5)
  assert np.abs(product(9, 4) - product(9, 5)).max() > 0.1


def test_position_zero_turns_nothing_and_lengths_stay() -> None:
  np.testing.assert_array_equal(run(X, np.zeros((B, S), np.int32), CFG), X)
  after, before = (np.linalg.norm(x, axis=-1) for x in (run(X, POSITIONS, CFG), X))
  np.testing.assert_allclose(after, before, rtol=1e-5)


def test_bfloat16_counts_past_256() -> None:
  """Angles are float32: as bfloat16 the positions 300 and 301 would be one."""
  x = jnp.ones((1, 2, 1, D), jnp.bfloat16)
  y = run(x, np.array([[300, 301]], np.int32), CFG)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(np.float32), oracle.rope(x, [[300, 301]], CFG.theta), atol=2e-2)


def test_a_base_that_makes_no_wavelengths_is_an_error() -> None:
  with pytest.raises(ConfigError, match='theta=1.0: use a number above 1'):
    RopeConfig(theta=1.0)
