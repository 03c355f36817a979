"""What is random about routing: jitter, noise, expert dropout and the second expert of GShard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.routing import RouterConfig, route
from moejax.moe.selection import (
  EXPERT_DROPOUT,
  SECOND,
  Tokens,
  draw_by_token,
  jittered,
  keep_second,
  noisy,
  without_some,
)
from tests.moe.slopes import check_slopes
from tests.support import oracle
from tests.support.quick import QUICK

# Randomness.
ROWS = np.array([3, 8, 11, 20], np.int32)


def some_tokens(rows: np.ndarray, length: int, key: Array | None) -> Tokens:
  shape = (len(rows), length)
  return Tokens(
    np.zeros(shape, np.int32), np.ones(shape, bool), np.ones(shape, np.int32), rows, key
  )


@functools.partial(jax.jit, compiler_options=QUICK)
def draws(tokens: Tokens) -> dict[str, Array]:
  """Everything that is random, of inputs that are the same everywhere."""
  b, s = tokens.mask.shape
  return {
    'jitter': jittered(jnp.ones((b, s, 3)), tokens, 0.25),
    'noise': noisy(jnp.zeros((b, s, 8)), jnp.ones((b, s, 8)), tokens, 2)[0],
    'second': keep_second(jnp.full((b, s, 2), 0.25), tokens),
    'dropout': without_some(jnp.zeros((b, s, 8)), tokens, 0.25),
  }


@functools.cache
def drawn() -> dict[str, np.ndarray]:
  return jax.device_get(draws(some_tokens(ROWS, 64, jax.random.key(1))))


def test_what_is_random_is_a_function_of_key_row_and_place_alone() -> None:
  whole, key = drawn(), jax.random.key(1)
  parts = [draws(some_tokens(ROWS[i : i + 2], 64, key)) for i in (0, 2)]
  longer = draws(some_tokens(ROWS, 80, key))
  # Padding on the left, on the right and in the middle: the tokens that count are the same 64.
  real = np.tile(np.r_[[False] * 5, [True] * 30, [False] * 4, [True] * 34, [False] * 7], (4, 1))
  padded = draws(some_tokens(ROWS, 80, key)._replace(mask=real))
  # Token by token to a cache, which lies before the first column.
  later = np.tile(np.arange(40, 64, dtype=np.int32), (4, 1))
  continued = draws(some_tokens(ROWS, 24, key)._replace(places=later))
  swapped = draws(some_tokens(ROWS[::-1].copy(), 64, key))
  elsewhere = draws(some_tokens(ROWS, 64, jax.random.key(2)))
  for name, draw in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), draw, name)
    np.testing.assert_array_equal(longer[name][:, :64], draw, name)
    np.testing.assert_array_equal(padded[name][real].reshape(draw.shape), draw, name)
    np.testing.assert_array_equal(continued[name], draw[:, 40:], name)
    np.testing.assert_array_equal(swapped[name][::-1], draw, name)
    assert not np.array_equal(elsewhere[name], draw), name
    if name != 'dropout':
      assert len({row.tobytes() for row in draw}) == len(ROWS), f'{name}: rows draw the same'
      assert len({place.tobytes() for place in draw[0, :, ...]}) > 1, (
        f'{name}: places draw the same'
      )


def test_without_a_key_nothing_is_random() -> None:
  nothing = draws(some_tokens(ROWS, 64, None))
  assert (nothing['jitter'] == 1).all() and not nothing['noise'].any() and nothing['second'].all()
  assert not nothing['dropout'].any()


def test_jitter_is_even_between_its_bounds_and_noise_is_normal() -> None:
  factor, noise = drawn()['jitter'], drawn()['noise']
  assert factor.min() >= 0.75 and factor.max() <= 1.25
  n = factor.size  # 768; bounds at four standard deviations
  assert abs(factor.mean() - 1) < 4 * 0.25 / np.sqrt(3 * n)
  assert abs(factor.var() / (0.25**2 / 3) - 1) < 4 * np.sqrt(0.8 / n)
  assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
  assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)


@pytest.mark.parametrize('epsilon', [1e-3, 0.01, 0.25])
def test_jitter_is_not_rounded_to_the_dtype_of_what_it_jitters(epsilon: float) -> None:
  """Of bfloat16 it makes as many factors as of float32: 1 + 1e-3 is 1 there."""
  x = jnp.full((4, 64, 3), 1.5, jnp.bfloat16)
  tokens = some_tokens(ROWS, 64, jax.random.key(1))
  got = np.asarray(jittered(x, tokens, epsilon))
  assert got.dtype == np.float32 and np.unique(got).size > 0.9 * got.size
  np.testing.assert_array_equal(got, jittered(x.astype(jnp.float32), tokens, epsilon))
  assert np.abs(got / 1.5 - 1).max() <= epsilon * (1 + 1e-3)
  assert jittered(x, tokens, 0.0) is x


@pytest.mark.parametrize(('fraction', 'count'), [(0.25, 2), (0.5, 4), (0.3, 2)])
def test_expert_dropout_drops_as_many_as_it_says_in_the_whole_layer(
  fraction: float, count: int
) -> None:
  def gone_with(seed: Array) -> Array:
    tokens = some_tokens(ROWS, 3, jax.random.key(seed))
    return jnp.isneginf(without_some(jnp.zeros((4, 3, 8)), tokens, fraction))

  gone = np.asarray(jax.jit(jax.vmap(gone_with), compiler_options=QUICK)(jnp.arange(256)))
  assert (gone.sum(-1) == count).all() and (gone == gone[:, :1, :1]).all()
  often = gone[:, 0, 0].mean(0)  # each expert alike: four standard deviations of 256 draws
  assert np.abs(often - count / 8).max() < 4 * np.sqrt(count / 8 * (1 - count / 8) / 256)


def test_a_dropped_expert_is_chosen_by_nobody() -> None:
  rng = np.random.default_rng(8)
  logits = rng.normal(size=(4, 64, 8)).astype(np.float32)
  tokens = some_tokens(ROWS, 64, jax.random.key(1))
  cfg = RouterConfig(8, 2, expert_dropout=0.25)
  go = jax.jit(functools.partial(route, cfg=cfg), compiler_options=QUICK)
  gone = set(np.flatnonzero(np.isneginf(drawn()['dropout'][0, 0])).tolist())
  chosen = set(np.unique(go(logits, jnp.zeros(8), tokens=tokens).expert_ids).tolist())
  assert len(gone) == 2 and chosen == set(range(8)) - gone
  order = jax.random.permutation(jax.random.fold_in(tokens.key, EXPERT_DROPOUT), 8)
  assert gone == set(np.flatnonzero(np.asarray(order) < 2).tolist())


@pytest.mark.parametrize('renormalise', [True, False])
def test_gshards_second_expert_is_kept_as_often_as_its_weight_says(renormalise: bool) -> None:
  rng = np.random.default_rng(9)
  rows = np.arange(16, dtype=np.int32)
  tokens = some_tokens(rows, 256, jax.random.key(3))
  logits = (3 * rng.normal(size=(16, 256, 8))).astype(np.float32)
  cfg = RouterConfig(8, 2, 'sigmoid', renormalise=renormalise, scale=2.0, random_second=True)
  go = jax.jit(functools.partial(route, cfg=cfg), compiler_options=QUICK)
  got = go(logits, jnp.zeros(8), tokens=tokens)
  best = np.argsort(-logits, -1)[..., :2]
  weights = oracle.weigh_chosen(oracle.log_scores(logits, 'sigmoid'), best, renormalise)
  draw = np.asarray(draw_by_token(jax.random.uniform, tokens, SECOND))
  kept = oracle.second_kept(weights, draw)
  np.testing.assert_array_equal(got.expert_ids, np.where(kept, best, 8))
  np.testing.assert_allclose(got.weights, 2 * np.where(kept, weights, 0), rtol=3e-6)
  chance = np.minimum(1, 2 * weights[..., 1])
  assert (got.expert_ids[..., 0] < 8).all() and (got.expert_ids[..., 1] < 8)[chance == 1].all()
  assert renormalise or (chance == 1).sum() > 1000
  deviation = np.sqrt((chance * (1 - chance)).sum())
  assert 0 < deviation and abs(kept[..., 1].sum() - chance.sum()) < 4 * deviation
  # A record is used as it is: another key draws no expert out of it.
  if not renormalise:
    return
  again = go(
    logits, jnp.zeros(8), tokens=tokens._replace(key=jax.random.key(4), replayed=got.expert_ids)
  )
  np.testing.assert_array_equal(again.expert_ids, got.expert_ids)
  both = kept.all(-1)
  np.testing.assert_allclose(again.weights[both], got.weights[both], rtol=1e-6)
  np.testing.assert_array_equal(again.weights[~both][:, 1], 0)


@functools.partial(jax.jit, compiler_options=QUICK)
def noisy_and_gradient(
  logits: Array, std: Array, tokens: Tokens, to: Array
) -> tuple[Array, Array, Array, Array]:
  """H, P, and the gradient of Σ P · to to (logits, std)."""
  (h, chance), pull = jax.vjp(lambda z, s: noisy(z, s, tokens, 2), logits, std)
  return (h, chance, *pull((jnp.zeros_like(h), to)))


def test_how_likely_an_expert_is_chosen_is_the_oracles() -> None:
  rng = np.random.default_rng(10)
  logits = rng.normal(size=(4, 64, 8)).astype(np.float32)
  std, to = (rng.uniform(0.3, 1.5, logits.shape).astype(np.float32) for _ in range(2))
  tokens = some_tokens(ROWS, 64, jax.random.key(1))
  h, chance, *gradients = noisy_and_gradient(logits, std, tokens, to)
  draw = drawn()['noise'].astype(np.float64)
  np.testing.assert_allclose(h, logits + draw * std, rtol=1e-5, atol=1e-6)
  few = np.s_[:, :4]  # the oracle is slow
  np.testing.assert_allclose(
    chance[few], oracle.likely(logits[few], h[few], std[few], 2), rtol=2e-5, atol=2e-6
  )
  # As E takes turns to draw anew, P adds up to K on average.
  assert abs(np.asarray(chance).sum(-1).mean() - 2) < 0.05

  def value(z: np.ndarray, s: np.ndarray) -> np.ndarray:
    return oracle.likely(z[few], (z + draw * s)[few], s[few], 2) * to[few]

  check_slopes(
    gradients[0][few], lambda z: value(np.concatenate([z, logits[:, 4:]], 1), std), logits[few]
  )
  check_slopes(
    gradients[1][few], lambda s: value(logits, np.concatenate([s, std[:, 4:]], 1)), std[few]
  )


def test_how_likely_is_what_drawing_anew_gives() -> None:
  rng = np.random.default_rng(11)
  logits, std = np.array([1.0, 0.5, 0.2, -0.3, -1.0]), np.array([0.5, 1.0, 0.7, 1.5, 0.4])
  h, n = logits + rng.normal(size=5) * std, 20_000
  for e in range(5):
    drawn_anew = np.tile(h, (n, 1))
    drawn_anew[:, e] = logits[e] + rng.normal(size=n) * std[e]
    often = np.mean((drawn_anew > drawn_anew[:, [e]]).sum(1) < 2)
    chance = oracle.likely(logits, h, std, 2)[e]
    assert abs(often - chance) < 4 * np.sqrt(chance * (1 - chance) / n) + 1e-9, e


def test_likelihood_and_gradient_stay_finite_without_noise_and_at_extremes() -> None:
  logits, std = np.zeros((4, 64, 8), np.float32), np.ones((4, 64, 8), np.float32)
  rng = np.random.default_rng(12)
  logits[0] = rng.normal(size=(64, 8))
  logits[1] = rng.choice([-1e4, 0, 1e4], (64, 8))
  logits[3] = rng.integers(0, 2, (64, 8))
  std[:] = np.repeat([0, 1e-12, 1e-6, 1e-3, 1, 10, 1e3, 1e4], 8)[:, None]
  got = noisy_and_gradient(
    logits, std, some_tokens(ROWS, 64, jax.random.key(4)), np.ones_like(logits)
  )
  assert all(np.isfinite(x).all() for x in got)
  chance = np.asarray(got[1])
  assert (chance >= 0).all() and (chance <= 1).all()
  # Without noise: the two best, for certain.
  np.testing.assert_array_equal(chance[0, :8].sum(-1), 2)


def test_noise_decides_and_weighs_in_training_and_not_in_evaluation() -> None:
  rng = np.random.default_rng(13)
  logits = rng.normal(size=(4, 64, 8)).astype(np.float32)
  tokens, std = some_tokens(ROWS, 64, jax.random.key(1)), np.ones(logits.shape, np.float32)
  go = jax.jit(
    functools.partial(route, cfg=RouterConfig(8, 2, 'sigmoid', noisy=True)), compiler_options=QUICK
  )
  trained = go(logits, jnp.zeros(8), tokens=tokens, noise_std=std)
  np.testing.assert_allclose(trained.logits, logits + drawn()['noise'], rtol=1e-6, atol=1e-6)
  want = oracle.route(trained.logits, np.zeros(8), top_k=2, score_fn='sigmoid')
  np.testing.assert_array_equal(trained.expert_ids, want.expert_ids)
  np.testing.assert_allclose(trained.weights, want.weights, rtol=3e-6)
  evaluated = go(logits, jnp.zeros(8), tokens=tokens._replace(key=None), noise_std=std)
  np.testing.assert_array_equal(evaluated.logits, logits)
  assert not evaluated.likely.any() and trained.likely.any()
