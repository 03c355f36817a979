"""Bias rules against the oracle, and what every rule must do whatever its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.moe.bias import BIAS_RULES
from moejax.moe.routing import SCORE_FNS, RouterConfig, route

rules = pytest.mark.parametrize('rule', sorted(BIAS_RULES))


@functools.cache
def update(rule: str) -> jax.stages.Wrapped:
  return jax.jit(BIAS_RULES[rule].update)


def some_bias(num_experts: int) -> np.ndarray:
  return np.random.default_rng(num_experts).normal(scale=0.1, size=num_experts).astype(np.float32)


@pytest.mark.parametrize('num_experts', [4, 8])
@rules
def test_update_is_the_oracles(rule: str, num_experts: int) -> None:
  rng = np.random.default_rng(0)
  bias = some_bias(num_experts)
  loads = {
    'uneven': rng.integers(0, 50, num_experts), 'all to one': np.eye(num_experts)[1] * 37,
    'one unchosen': np.r_[0, rng.integers(1, 50, num_experts - 1)], 'even': np.full(num_experts, 12),
    'nothing': np.zeros(num_experts), 'single token': np.eye(num_experts)[2],
    'large': rng.integers(10**6, 10**7, num_experts),
  }
  for label, load in loads.items():
    for rate in (1e-3, 0.0):
      got = update(rule)(bias, load.astype(np.float32), rate)
      want = oracle.BIAS_RULES[rule](bias, load, rate)
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=label)
      assert got.dtype == jnp.float32 and got.shape == bias.shape


@pytest.mark.parametrize('num_experts', [3, 4, 5, 6, 7, 8, 10, 12, 60, 160])
@rules
def test_even_load_and_no_load_move_nothing(rule: str, num_experts: int) -> None:
  """Also where E is no power of two: a mean off by a rounding would be a whole step of the sign rule."""
  bias = some_bias(num_experts)
  for count in (0, 1, 7, 11, 4099):
    load = np.full(num_experts, count, np.float32)
    np.testing.assert_allclose(update(rule)(bias, load, 1e-3), bias, rtol=1e-7, atol=1e-9, err_msg=f'{count}')


@rules
def test_begins_at_zero_in_float32(rule: str) -> None:
  bias = BIAS_RULES[rule].init(6)
  assert bias.shape == (6,) and bias.dtype == jnp.float32 and not bias.any()


@rules
def test_crowded_experts_go_down_and_empty_ones_up(rule: str) -> None:
  load = np.array([9, 5, 1, 6, 4, 10, 0], np.float32)
  for copies in (1, 11, 4099):  # the expert with the mean load stays, to a rounding
    moved = np.asarray(update(rule)(np.zeros(7, np.float32), load * copies, 1.0))
    np.testing.assert_array_equal(np.where(np.abs(moved) < 1e-6, 0, np.sign(moved)), np.sign(5 - load))


@rules
def test_renaming_experts_renames_the_bias(rule: str) -> None:
  bias, load = some_bias(8), np.array([9, 5, 1, 6, 4, 5, 0, 12], np.float32)
  old_name = np.random.default_rng(3).permutation(8)
  np.testing.assert_array_equal(update(rule)(bias[old_name], load[old_name], 0.01),
                                np.asarray(update(rule)(bias, load, 0.01))[old_name])


@rules
def test_a_larger_batch_of_the_same_shares_is_the_same_step(rule: str) -> None:
  bias, load = some_bias(8), np.array([9, 5, 1, 6, 4, 5, 0, 12], np.float32)
  np.testing.assert_allclose(update(rule)(bias, 64 * load, 0.01), update(rule)(bias, load, 0.01), rtol=1e-6)


@rules
def test_layers_do_not_see_each_other(rule: str) -> None:
  bias = np.stack([some_bias(4), some_bias(4) + 1])
  load = np.array([[1, 2, 3, 4], [8, 0, 0, 0]], np.float32)
  both = jax.vmap(BIAS_RULES[rule].update, (0, 0, None))(bias, load, 0.01)
  for layer in range(2):
    np.testing.assert_allclose(both[layer], update(rule)(bias[layer], load[layer], 0.01), rtol=1e-6)


@rules
def test_counts_of_the_whole_batch_are_not_the_mean_of_what_shards_would_do(rule: str) -> None:
  """One step from global counts is the rule; the mean of what uneven shards would do is another."""
  shards = np.array([[8, 0, 0, 0], [1, 3, 2, 2], [0, 4, 3, 9]], np.float32)
  bias = np.zeros(4, np.float32)
  whole = np.asarray(update(rule)(bias, shards.sum(0), 1.0))
  apart = np.mean([update(rule)(bias, load, 1.0) for load in shards], axis=0)
  np.testing.assert_allclose(whole, oracle.BIAS_RULES[rule](bias, shards.sum(0), 1.0), rtol=1e-6)
  assert np.abs(whole - apart).max() > 0.1


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
@rules
def test_closes_the_loop_with_the_router(rule: str, score_fn: str) -> None:
  """A fixed crowd that prefers some experts: the bias alone spreads it, weights stay those of the scores."""
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(4, 64, 8)) + np.linspace(-1, 1, 8)).astype(np.float32)
  cfg = RouterConfig(8, 2, score_fn)

  def step(bias: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    load = jax.nn.one_hot(route(logits, bias, cfg).expert_ids, 8).sum((0, 1, 2))
    return BIAS_RULES[rule].update(bias, load, rate), load

  rates = 0.01 * np.linspace(1, 0, 200, dtype=np.float32)
  bias, loads = jax.jit(lambda: jax.lax.scan(step, BIAS_RULES[rule].init(8), rates))()
  assert oracle.max_vio(loads[0]) > 0.8
  assert oracle.max_vio(loads[-1]) < 0.15, loads[-1]
  assert np.isfinite(bias).all()
