"""Rotary positions against the oracle: only the distance of two tokens counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.model.rope import (
  RopeConfig,
  YarnConfig,
  attention_factor,
  inverse_frequencies,
  rotate,
  softmax_factor,
)
from tests.support import oracle

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


def halves(x: np.ndarray) -> np.ndarray:
  """Interleaved pairs in the order in which `rotate` gives them back."""
  return np.concatenate([x[..., 0::2], x[..., 1::2]], -1)


def test_interleaved_pairs_are_the_oracles_in_the_order_of_halves() -> None:
  cfg = dataclasses.replace(CFG, interleaved=True)
  want = oracle.rope(X, POSITIONS, 100.0, interleaved=True)
  np.testing.assert_allclose(run(X, POSITIONS, cfg), halves(want), atol=2e-3)
  # The same turn of the same pairs.
  assert np.abs(halves(want) - run(halves(X), POSITIONS, CFG)).max() < 2e-3
  assert np.abs(halves(want) - run(X, POSITIONS, CFG)).max() > 1


@pytest.mark.parametrize('interleaved', [False, True])
def test_a_fraction_turns_the_first_channels_and_passes_the_others(interleaved: bool) -> None:
  cfg = RopeConfig(100.0, 0.5, interleaved)
  y = run(X, POSITIONS, cfg)
  want = oracle.rope(X, POSITIONS, 100.0, rotated=4, interleaved=interleaved)[..., :4]
  if interleaved:
    want = halves(want)
  np.testing.assert_array_equal(y[..., 4:], X[..., 4:])
  np.testing.assert_allclose(y[..., :4], want, atol=2e-3)


# A ramp over some pairs, over a part of one, of no width at all; ends outside the pairs; the
# published ones.
YARNS = {
  'ramp': (8, 100.0, YarnConfig(4.0, 64)),
  'not truncated': (8, 100.0, YarnConfig(4.0, 64, truncate=False)),
  'steep': (8, 100.0, YarnConfig(4.0, 64, 2.0, 1.9, truncate=False)),
  'no ramp': (8, 100.0, YarnConfig(4.0, 5)),
  'no width': (8, 100.0, YarnConfig(4.0, 4096, 30.0, 30.0, truncate=False)),
  'short': (4, 10.0, YarnConfig(2.0, 4096, 3.0)),
  'deepseek': (64, 10_000.0, YarnConfig(40.0, 4096)),
  'gpt-oss': (64, 150_000.0, YarnConfig(32.0, truncate=False)),
}


@pytest.mark.parametrize('name', YARNS)
def test_yarn_is_the_oracles(name: str) -> None:
  dim, theta, yarn = YARNS[name]
  got = inverse_frequencies(dim, RopeConfig(theta, yarn=yarn))
  ramp = yarn.original_length, yarn.beta_fast, yarn.beta_slow, yarn.truncate
  want = oracle.yarn_frequencies(dim, theta, yarn.factor, *ramp)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  plain = theta ** (-np.arange(0, dim, 2) / dim)
  assert (want <= plain * (1 + 1e-12)).all() and (want >= plain / yarn.factor * (1 - 1e-12)).all()


def test_every_field_of_yarn_matters() -> None:
  base = RopeConfig(100.0, yarn=YarnConfig(4.0, 64, 16.0, 1.0))
  for change in (
    {'factor': 1.0},
    {'factor': 5.0},
    {'original_length': 640},
    {'beta_fast': 1.0},
    {'beta_slow': 0.05},
    {'truncate': False},
  ):
    other = dataclasses.replace(base, yarn=dataclasses.replace(base.yarn, **change))
    assert np.abs(inverse_frequencies(D, base) - inverse_frequencies(D, other)).max() > 1e-3, change


def test_factors_are_those_of_the_published_models() -> None:
  def factors(**yarn: float) -> tuple[float, float]:
    cfg = RopeConfig(yarn=YarnConfig(**yarn))
    return attention_factor(cfg), softmax_factor(cfg)

  m = oracle.mscale
  assert factors(mscale=0.7, mscale_all_dim=1.0) == (1, 1), 'YaRN is off'
  assert factors(factor=32) == pytest.approx((m(32, 1), 1))  # gpt-oss
  deepseek_v3 = pytest.approx((1, m(40, 1) ** 2))
  assert factors(factor=40, mscale=1, mscale_all_dim=1) == deepseek_v3
  both = pytest.approx((m(40, 0.7) / m(40, 0.9), m(40, 0.9) ** 2))
  assert factors(factor=40, mscale=0.7, mscale_all_dim=0.9) == both
  assert factors(factor=40, mscale_all_dim=0.9) == pytest.approx((m(40, 1), m(40, 0.9) ** 2))
  assert factors(factor=40, mscale=0.7) == pytest.approx((m(40, 1), 1))
  assert factors(factor=40, mscale=0.7, mscale_all_dim=0.9, attention_factor=1.5)[0] == 1.5


def test_the_attention_factor_is_on_the_channels_that_turn() -> None:
  cfg = RopeConfig(100.0, 0.5, yarn=YarnConfig(4.0, 64, attention_factor=1.5))
  y = run(X, POSITIONS, cfg)
  want = oracle.rope(
    X,
    POSITIONS,
    100.0,
    rotated=4,
    magnitude=1.5,
    frequencies=oracle.yarn_frequencies(4, 100.0, 4.0, 64),
  )
  np.testing.assert_allclose(y, want, atol=3e-3)
  assert np.linalg.norm(y[..., :4]) == pytest.approx(1.5 * np.linalg.norm(X[..., :4]), rel=1e-5)


def test_gradient_turns_back() -> None:
  """A rotation's transpose is its inverse: the gradient of y · dy is dy turned back."""
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
  want = oracle.rope(x, [[300, 301]], CFG.theta)
  np.testing.assert_allclose(y.astype(np.float32), want, atol=2e-2)


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    RopeConfig(theta=1.0, fraction=1.5)
  assert error.value.problems == (
    'theta=1.0: use a number above 1',
    'fraction=1.5: use a number above 0, at most 1',
  )
  with pytest.raises(ConfigError) as error:
    YarnConfig(factor=0.5, original_length=0, beta_slow=40.0, mscale=-1.0, attention_factor=-1.0)
  assert [problem.split(':')[0] for problem in error.value.problems] == [
    'factor=0.5',
    'original_length=0',
    'beta_slow=40.0',
    'mscale=-1.0',
    'attention_factor=-1.0',
  ]


@pytest.mark.parametrize('interleaved', [False, True])
def test_bfloat16_is_rounded_once(interleaved: bool) -> None:
  """The nearest bfloat16 of the oracle's number, but where float32 lies near the middle of two."""
  x = jnp.asarray(X, jnp.bfloat16)
  want = oracle.rope(np.asarray(x, np.float64), POSITIONS[:1], 100.0, interleaved=interleaved)
  want = halves(want) if interleaved else want
  got = run(x[:1], POSITIONS[:1], RopeConfig(100.0, 1.0, interleaved))
  assert got.dtype == jnp.bfloat16
  nearest = jnp.asarray(want[:1], jnp.float32).astype(jnp.bfloat16)
  assert (np.asarray(got) == np.asarray(nearest)).mean() > 0.99
