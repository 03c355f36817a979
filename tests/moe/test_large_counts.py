"""Counts that float32 does not hold: past 2^24 it loses ones, and the rules live on ones.

Arrays are small: what is large is how many micro-batches have been added up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import statistics
from moejax.moe.balance.aux_loss import row_sets_loss
from moejax.moe.balance.losses import BALANCE_LOSSES, micro_batch_shares
from moejax.moe.bias import BIAS_RULES, counts, init_bias_state
from moejax.moe.routing import RouterConfig, Routing, route
from moejax.moe.statistics import layer_statistics, observe, pair_counts, token_statistics
from moejax.moe.token_sets import Scope, exact_mean, total_of
from tests.support import oracle
from tests.support.quick import QUICK

E, K = 6, 2
COUNTING = sorted(rule for rule in BIAS_RULES if BIAS_RULES[rule].observe is counts)
# Two copies for each expert; the bias rules see no more of it than its counts.
IDS = np.array([[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5]], np.int32)[None]
MASK = np.ones((1, 6), bool)
LOGITS = np.zeros((1, 6, E), np.float32)
np.put_along_axis(LOGITS, IDS, 1.0, axis=-1)
MICRO_BATCHES = 2**25 + 1  # of 12 copies: 2^26 and 2 for each expert


@functools.cache
def routing() -> Routing:
  found = route(LOGITS, jnp.zeros(E), RouterConfig(E, K))
  np.testing.assert_array_equal(np.sort(found.expert_ids), IDS)
  return found


def added_up(sums: object, times: int) -> object:
  """The sums of so many equal micro-batches, by doubling: `times` additions would take a while."""
  total = jax.tree.map(jnp.zeros_like, sums)
  while times:
    if times % 2:
      total = jax.tree.map(jnp.add, total, sums)
    sums, times = jax.tree.map(jnp.add, sums, sums), times // 2
  return total


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def update(rules: tuple[str, ...], seen: jax.Array, rate: float) -> dict[str, jax.Array]:
  """Rule -> how far the bias moves from 0."""
  state = init_bias_state(seen.shape[-1] if seen.ndim == 1 else len(seen))
  return {rule: BIAS_RULES[rule].update(state, seen, rate, K).bias for rule in rules}


@pytest.mark.parametrize('rule', sorted(BIAS_RULES))
def test_a_rule_counts_every_copy_of_a_large_batch(rule: str) -> None:
  """An even load does not push, and one copy more does, by the oracle's step."""
  seen = BIAS_RULES[rule].observe(routing(), jnp.zeros(E), MASK)
  total = added_up(seen, MICRO_BATCHES)
  assert seen.dtype == total.dtype == jnp.int32
  assert np.asarray(total, np.int64).sum() == MICRO_BATCHES * np.asarray(seen).sum() > 2**24
  if rule == 'quantile':
    # The quantiles of many equal batches are those of one.
    one, many = (update((rule,), each, 0.5)[rule] for each in (seen, total))
    np.testing.assert_allclose(many, one, atol=1e-6)
    return
  assert not update((rule,), total, 0.5)[rule].any()
  uneven = total.at[3].add(1)
  want = oracle.COUNT_RULES[rule](
    oracle.BiasState(np.zeros(E), np.zeros(E)), np.asarray(uneven, np.float64), 0.5
  )
  moved = update((rule,), uneven, 0.5)[rule]
  np.testing.assert_allclose(moved, want.bias, rtol=1e-5, atol=1e-12)
  assert moved[3] < 0 < moved[0]


@pytest.mark.parametrize('experts', [2, 3, 7, 60, 256])
def test_signs_are_those_of_whole_numbers_up_to_the_last_of_int32(experts: int) -> None:
  """Counts near 2^24, 2^26, 2^31 / E and 2^31, whose sum and E times which int32 does not hold."""
  rng, largest = np.random.default_rng(experts), 2**31 - 1
  for near in (2**24, 2**26, 2**31 // experts, largest - 40):
    for spread in (0, 1, 2, 40):
      load = np.minimum(near + rng.integers(0, spread + 1, experts), largest).astype(np.int32)
      exact = [int(c) for c in load]
      want = [np.sign(sum(exact) - experts * c) for c in exact]
      moved = update(('sign', 'proportional'), load, 1.0)
      np.testing.assert_array_equal(moved['sign'], want, err_msg=f'{load}')
      np.testing.assert_array_equal(np.sign(moved['proportional']), want)
      mean = exact_mean(load)
      assert experts * int(mean.whole) + int(mean.rest) == sum(exact)
      np.testing.assert_allclose(total_of(mean, experts), sum(exact), rtol=1e-6)


@pytest.mark.parametrize('kind', ['numpy', 'jax'])
def test_statistics_of_an_even_load_are_those_of_balance(kind: str) -> None:
  """To the bit, for counts of all sizes: a mean that rounds would show a max_vio of 1e-7."""
  sizes = [5, 4099, 2**24 + 1, 2**26 + 3, 2**31 - 1]
  load = np.outer(sizes, np.ones(7, np.int64)).astype(np.int32)
  found = layer_statistics(load if kind == 'numpy' else jnp.asarray(load), K)
  assert not found['max_vio'].any() and (found['balance_score'] == 1).all()
  np.testing.assert_allclose(found['load_entropy'], 1, rtol=1e-6)
  load[:, 0] -= 5
  assert (layer_statistics(load, K)['max_vio'] > 0).all()


def test_sums_of_statistics_count_every_token() -> None:
  stats = observe(routing(), routing().best_ids, MASK)
  total = added_up(stats, MICRO_BATCHES)
  for name in ('tokens', 'copies', 'pairs', 'near_ties', 'overrides'):
    one, many = (np.asarray(getattr(each, name), np.int64) for each in (stats, total))
    np.testing.assert_array_equal(many, MICRO_BATCHES * one, err_msg=name)
  layers = [jax.tree.map(lambda a: a[None], each) for each in (stats, total)]
  one, many = (token_statistics(each) for each in layers)
  for name in set(one) - {'logit_max'}:  # which `add` does not add
    np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_pairs_are_added_as_integers_before_a_product_loses_ones(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The largest product is of so many rows that no count in it can pass the limit."""
  rng = np.random.default_rng(0)
  chosen = rng.integers(0, 2, (7, 5, 4), np.int32)
  flat = chosen.reshape(-1, 4)
  for limit in (1, 5, 12, 35, 100):
    monkeypatch.setattr(statistics, 'EXACT', limit)
    np.testing.assert_array_equal(pair_counts(chosen), flat.T @ flat)
  assert pair_counts(chosen).dtype == jnp.int32


@pytest.mark.parametrize('each', [2**24 + 1, 2**26 + 1, 2**31 // E + 5, 2**31 - 1])
def test_f_of_a_large_set_is_made_of_whole_numbers(each: int) -> None:
  """Even counts give exactly what f = 1 gives; M times them, or their sum, int32 does not hold."""
  whole = np.full(E, each, np.int32)
  found = functools.partial(row_sets_loss, routing(), MASK, MASK)
  for partition in (0, 3):
    scope = Scope(rows=4, partition=partition, whole=whole)
    want = found(scope._replace(whole=np.zeros(E, np.int32)))
    if each <= (2**31 - 1) // (E // 3):
      np.testing.assert_allclose(found(scope), want, rtol=2e-7)
  lopsided = whole - np.arange(E, dtype=np.int32)
  f = E * lopsided.astype(np.float64) / lopsided.astype(np.float64).sum()
  want = (f * np.asarray(routing().probs, np.float64).mean((0, 1))).sum()
  np.testing.assert_allclose(found(Scope(rows=4, whole=lopsided)), want, rtol=1e-6)


@pytest.mark.parametrize('loss', sorted(BALANCE_LOSSES))
def test_what_a_set_counts_is_whole_and_shares_are_of_whole_numbers(loss: str) -> None:
  row = BALANCE_LOSSES[loss]
  seen = jax.eval_shape(lambda: row.seen(routing(), MASK, Scope(rows=2)))
  assert seen.dtype == (jnp.int32 if row.linear else jnp.float32)
  masks = np.ones((2, 1, 6), bool)
  shares = micro_batch_shares(loss, masks, masks.astype(np.int32), Scope(rows=row.rows(2, 2, 1)))
  np.testing.assert_allclose(shares, [0.5, 0.5])
