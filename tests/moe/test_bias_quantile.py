"""The quantile rule's histogram: exact counts, bins that hold what they say, and the quantile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.bias_quantile import BINS, EDGES, above_the_line, bin_of, histogram, quantile
from moejax.moe.routing import RouterConfig, route
from tests.moe.bias_cases import B, E, K, S, batches, some_state
from tests.support import oracle
from tests.support.quick import QUICK


# The quantile rule's histogram.
@functools.cache
def shards() -> np.ndarray:
  """Scores [shards, T, E] of shards that each crowd other experts.

  What one shard alone would balance differs.
  """
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(8, 256, E)) + rng.normal(size=E) + 2 * rng.normal(size=(8, 1, E))
  return (1 / (1 + np.exp(-logits))).astype(np.float32)


def spread(bias: np.ndarray) -> float:
  """MaxVio of all shards' tokens together."""
  chosen = np.argsort(-(shards() + np.float32(bias)), axis=-1, kind='stable')[..., :K]
  return oracle.max_vio(np.bincount(chosen.ravel(), minlength=E))


def seen_of(choice: jax.Array, mask: jax.Array, top_k: int = K) -> jax.Array:
  """The histogram where top-k chooses. [B, S, E], [B, S] -> [E, BINS]."""
  return histogram(choice, jax.lax.top_k(choice, top_k)[1], mask)


@functools.partial(jax.jit, compiler_options=QUICK)
def histograms(bias: jax.Array) -> jax.Array:
  """Of each shard. [E] -> [shards, E, BINS]."""
  return jax.vmap(lambda choice: seen_of(choice, jnp.ones(choice.shape[:2], bool)))(
    shards()[:, None] + bias
  )


quantiles = jax.jit(jax.vmap(lambda seen: quantile(seen, K)), compiler_options=QUICK)


def test_pooled_histograms_balance_and_averaged_quantiles_do_not() -> None:
  """Pooled: as even as exact quantiles of all tokens.

  Averaged, on shards that differ: hardly better than nothing.
  """
  pooled, averaged, exact = np.zeros(E, np.float32), np.zeros(E, np.float32), np.zeros(E)
  for _ in range(12):
    pooled = pooled - np.asarray(quantiles(histograms(pooled).sum(0, keepdims=True))[0])
    averaged = averaged - np.asarray(quantiles(histograms(averaged))).mean(0)
    choice = shards().reshape(-1, E) + exact
    x = choice - np.sort(choice, axis=-1)[:, [E - K - 1]]
    exact = exact - [oracle.exact_quantile(x[:, e], K, E) for e in range(E)]
    pooled, averaged, exact = (b - b.mean() for b in (pooled, averaged, exact))
  assert spread(np.zeros(E)) > 0.3
  assert spread(exact) < 0.03 and spread(pooled) < spread(exact) + 0.01
  assert spread(averaged) > 0.2


def test_the_line_is_the_next_largest() -> None:
  """It is the (K+1)-th of all where top-k chooses among all.

  With groups left out, above it are those that were taken.
  """
  scores, bias = batches()['plain'][0], some_state(E).bias
  for cfg in (
    RouterConfig(E, K, 'sigmoid'),
    RouterConfig(E, K, 'sigmoid', num_groups=4, top_groups=2),
  ):
    routing = jax.jit(route, static_argnames='cfg', compiler_options=QUICK)(scores, bias, cfg)
    x = np.asarray(above_the_line(routing.scores + bias, routing.expert_ids))
    seen = oracle.Seen(routing.scores, routing.expert_ids, np.ones((B, S), bool))
    np.testing.assert_array_equal(x.reshape(-1, E), oracle.above_the_line(bias, seen))
    np.testing.assert_array_equal(
      np.sort(np.argsort(-x, axis=-1)[..., :K]), np.sort(routing.expert_ids)
    )
    assert ((x > 0).sum(-1) == K).all() and (x.max(-1, where=x <= 0, initial=-1) == 0).all()
    if cfg.num_groups == 1:
      choice = np.asarray(routing.scores + bias)
      np.testing.assert_array_equal(x, choice - np.sort(choice, axis=-1)[..., [E - K - 1]])


def test_within_a_bin_of_the_exact_quantile() -> None:
  """One step is off by less than the bin that the quantile lies in, a quarter of it.

  The next step's bins are finer.
  """
  for seed in range(3):
    bias = some_state(E, seed).bias
    choice = shards().reshape(-1, E) + bias
    x = choice - np.sort(choice, axis=-1)[:, [E - K - 1]]
    exact = np.array([oracle.exact_quantile(x[:, e], K, E) for e in range(E)])
    got = np.asarray(quantiles(histograms(bias).sum(0, keepdims=True))[0])
    np.testing.assert_array_less(np.abs(got - exact), (np.abs(exact) + 2.0**-23) / 4)
    assert np.abs(got - exact).max() < 0.02 * np.abs(exact).max()


def test_histograms_add_up_over_shards_to_the_bit() -> None:
  """Counts are whole numbers.

  Micro-batches in any order, and eight devices, give the histogram of the whole batch.
  """
  bias = some_state(E).bias
  choice = np.asarray(shards() + bias)
  mask = np.random.default_rng(0).random(choice.shape[:2]) < 0.7
  expert_ids = np.argsort(-choice, axis=-1, kind='stable')[..., :K].astype(np.int32)
  count = jax.jit(histogram, compiler_options=QUICK)
  whole = count(choice, expert_ids, mask)
  parts = [
    np.asarray(count(choice, expert_ids, mask * (np.arange(8) == i)[:, None]))
    for i in (5, 2, 7, 0, 1, 6, 3, 4)
  ]
  np.testing.assert_array_equal(whole, sum(parts))
  np.testing.assert_array_equal(whole.sum(-1), mask.sum())
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  given = jax.device_put((choice, expert_ids, mask), rows)
  spread_out = count.lower(*given).compile()
  np.testing.assert_array_equal(whole, spread_out(*given))
  assert 'all-reduce' in spread_out.as_text() and 'all-gather' not in spread_out.as_text()


def test_every_number_is_in_its_bin() -> None:
  rng = np.random.default_rng(0)
  x = np.r_[
    0, 10.0 ** rng.uniform(-9, 3, 4000) * rng.choice([-1, 1], 4000), np.inf, -np.inf
  ].astype(np.float32)
  bins = np.asarray(bin_of(x))
  np.testing.assert_array_equal(bins, np.clip(np.searchsorted(EDGES, x, 'right') - 1, 0, BINS - 1))
  assert EDGES.shape == (BINS + 1,) and (np.diff(EDGES) > 0).all()
  assert EDGES[BINS // 2] == -EDGES[BINS // 2 + 1]
  for v in (0.0, 2.0**-26, -1e-7, 1e-3, -0.3, 5.0, 255.0, 300.0, -300.0):
    np.testing.assert_allclose(oracle.bin_around(v), EDGES[bin_of(np.float32(v)) :][:2], rtol=1e-6)
  assert 0 <= bin_of(np.float32(np.nan)) < BINS


def test_counts_are_whole_numbers_up_to_the_largest_batch() -> None:
  """A thousand million tokens, where float32 and E times the count would both go wrong."""
  n = 2**30 + 1
  seen = np.zeros((1, 4, BINS), np.int32)
  # K = 2 of 4 needs n/2, which is no whole number.
  for e, below in enumerate((n // 2, n // 2 + 1, n // 2 - 1, 0)):
    seen[0, e, 100], seen[0, e, 150] = below, n - below
  got = np.asarray(quantiles(seen)[0])
  np.testing.assert_array_equal(got > 0, [True, False, True, True])
  np.testing.assert_allclose(got[:3], [EDGES[150], EDGES[101], EDGES[150]], rtol=1e-6)


def test_the_middle_of_a_gap() -> None:
  """Any number between two tokens' would give the expert its share.

  Neither end of the gap is preferred.
  """
  seen = np.zeros((1, 4, BINS), np.int32)
  seen[0, :, [100, 150]] = 3
  np.testing.assert_allclose(
    quantiles(seen)[0], np.full(4, (EDGES[101] + EDGES[150]) / 2), rtol=1e-6
  )


@pytest.mark.parametrize('top_k', [1, 2, 3, 4])
def test_any_top_k_gives_finite_numbers(top_k: int) -> None:
  choice = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
  for mask in (np.ones((1, 5), bool), np.zeros((1, 5), bool)):
    assert np.isfinite(quantile(seen_of(choice, mask, top_k), top_k)).all()
