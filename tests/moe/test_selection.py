"""Every row of SELECTIONS against the oracle, what is random about routing, and who may look ahead."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.routing import SCORE_FNS, WEIGHTS, RouterConfig, Routing, route
from moejax.moe.selection import (
  EXPERT_DROPOUT,
  SECOND,
  SELECTIONS,
  Tokens,
  jittered,
  keep_second,
  noisy,
  row_keys,
  without_some,
)
from tests.support import oracle
from tests.support.quick import QUICK

S, E, K = 6, 4, 2
# Each row of the batch is a case: selections look at no more than a row.
CASES = (
  'plain',
  'padded',
  'holes',
  'ties',
  'extreme',
  'equal',
  'nothing counts',
  'one counts',
  'skewed',
  'low',
)
B = len(CASES)
WEIGHING = {
  'scores': RouterConfig(renormalise=False),
  'renormalised': RouterConfig(scale=2.5),
  'softmax after': RouterConfig(weigh='softmax', scale=0.5),
}

everywhere = pytest.mark.parametrize('name', sorted(SELECTIONS))


def batch() -> tuple[np.ndarray, np.ndarray, Tokens]:
  """Logits [B, S, E], a bias that decides, and the tokens."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(B, S, E))
  z[CASES.index('ties')] = rng.integers(0, 2, (S, E))
  z[CASES.index('extreme')] = rng.choice([-1e4, 0, 1e4], (S, E))
  z[CASES.index('equal')] = 0
  z[CASES.index('skewed')] += [4, 2, 0, -2]
  z[CASES.index('low')] -= 50
  mask = np.ones((B, S), bool)
  mask[CASES.index('padded'), 4:] = False
  mask[CASES.index('holes'), [0, 3, 4]] = False
  mask[CASES.index('nothing counts')] = False
  mask[CASES.index('one counts')] = np.arange(S) == 2
  ids = rng.integers(0, 50_000, (B, S)).astype(np.int32)
  tokens = Tokens(ids, mask, mask.astype(np.int32), np.arange(B, dtype=np.int32))
  return z.astype(np.float32), rng.normal(size=E).astype(np.float32), tokens


class Measured(NamedTuple):
  routing: Routing
  from_weights: tuple[Array, Array]  # gradient of Σ weights · to_weights to (logits, bias)
  from_probs: tuple[Array, Array]


def config(name: str, score_fn: str, weighing: str) -> RouterConfig:
  cfg = WEIGHING[weighing]
  return RouterConfig(E, K, score_fn, 1, 1, cfg.renormalise, cfg.scale, cfg.weigh, selection=name)


def weighing_of(name: str, score_fn: str) -> str:
  """In turns, so that every selection and every score function meets every way to weigh."""
  turn = sorted(SELECTIONS).index(name) + sorted(SCORE_FNS).index(score_fn)
  return list(WEIGHING)[turn % len(WEIGHING)]


def to_weights(name: str) -> np.ndarray:
  return (
    np.random.default_rng(1)
    .normal(size=(B, S, E if name == 'expert_choice' else K))
    .astype(np.float32)
  )


TO_PROBS = np.random.default_rng(2).normal(size=(B, S, E)).astype(np.float32)


def measure(logits: Array, bias: Array, tokens: Tokens, to: Array, cfg: RouterConfig) -> Measured:
  """The routing, and the gradients through weights and probs."""
  routing, pull = jax.vjp(lambda z, b: route(z, b, cfg, tokens), logits, bias)
  nothing = jax.tree.map(
    lambda x: jnp.zeros_like(x) if x.dtype == jnp.float32 else np.zeros(x.shape, jax.dtypes.float0),
    routing,
  )
  return Measured(
    routing, pull(nothing._replace(weights=to)), pull(nothing._replace(probs=TO_PROBS))
  )


@functools.partial(jax.jit, static_argnames='name', compiler_options=QUICK)
def measure_all(logits: Array, bias: Array, tokens: Tokens, name: str) -> dict[str, Measured]:
  """One program a selection, of all score functions."""
  return {
    score_fn: measure(
      logits, bias, tokens, to_weights(name), config(name, score_fn, weighing_of(name, score_fn))
    )
    for score_fn in SCORE_FNS
  }


@functools.cache
def measured(name: str) -> dict[str, Measured]:
  return jax.device_get(measure_all(*batch(), name))


def check_slopes(gradient: Array, f: object, logits: np.ndarray) -> None:
  """Holds a gradient [..., E] against the slope of the oracle's f: [..., E] -> [..., n], token by token."""
  direction = np.random.default_rng(3).normal(size=logits.shape)
  above, below = (f(logits + h * direction).sum(-1) for h in (1e-5, -1e-5))
  np.testing.assert_allclose(
    (np.asarray(gradient, np.float64) * direction).sum(-1),
    (above - below) / 2e-5,
    rtol=2e-5,
    atol=2e-6,
  )


def check_ids(
  got: np.ndarray, want: np.ndarray, log_s: np.ndarray, mask: np.ndarray, name: str
) -> None:
  """The oracle's choice, or where float32 rounds a near tie otherwise, one that is as good."""
  assert got.dtype == np.int32 and got.shape == want.shape
  if name in ('top_k', 'hash', 'uniform'):
    np.testing.assert_array_equal(got, want)
    return
  for b, case in enumerate(CASES):
    rows, near = log_s[b, mask[b]], 1e-6 * max(1.0, np.abs(log_s[b]).max())
    if name == 'expert_choice':
      assert (got[b][~mask[b]] == E).all()
      ones, others = (
        (ids[b][..., None] == np.arange(E)).any(1) for ids in (got, want)
      )  # [S, E], who has whom
      np.testing.assert_array_equal(ones.sum(0), others.sum(0), case)
      np.testing.assert_allclose(
        (ones[mask[b]] * rows).sum(0), (others[mask[b]] * rows).sum(0), atol=S * near, err_msg=case
      )
      ranked = np.take_along_axis(
        np.pad(log_s[b], ((0, 0), (0, 1)), constant_values=-np.inf), got[b], -1
      )
      assert (ranked[:, :-1] >= ranked[:, 1:] - near).all(), f'{case}: not best first, nobody last'
    elif mask[b].any():
      plan = oracle.sinkhorn_plan(rows)
      ones, others = (np.take_along_axis(plan, ids[b, mask[b]], -1) for ids in (got, want))
      np.testing.assert_allclose(ones, others, rtol=0, atol=20 * near, err_msg=case)
    if case in ('plain', 'padded', 'holes', 'one counts', 'skewed', 'low'):
      np.testing.assert_array_equal(got[b, mask[b]], want[b, mask[b]], case)


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
@everywhere
def test_selection_weights_and_gradients_are_the_oracles(name: str, score_fn: str) -> None:
  logits, bias, tokens = batch()
  scores, log_s = oracle.scores(logits, score_fn), oracle.log_scores(logits, score_fn)
  want = oracle.SELECTIONS[name](log_s, scores + bias, tokens.mask, tokens.ids, K)
  cfg = WEIGHING[weighing_of(name, score_fn)]
  got, from_weights, from_probs = measured(name)[score_fn]
  finite = (got._replace(margin=0), from_weights, from_probs)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(finite))
  check_ids(got.expert_ids, want, log_s, tokens.mask, name)
  np.testing.assert_allclose(got.scores, scores, rtol=3e-6, atol=1e-37)
  np.testing.assert_allclose(
    got.probs, oracle.probabilities(logits, score_fn), rtol=3e-6, atol=1e-37
  )
  np.testing.assert_allclose(got.probs.astype(np.float64).sum(-1), 1, rtol=1e-6)
  check_slopes(from_probs[0], lambda z: oracle.probabilities(z, score_fn) * TO_PROBS, logits)

  def weights(z: np.ndarray) -> np.ndarray:
    of = z if cfg.weigh == 'softmax' else oracle.log_scores(z, score_fn)
    return oracle.weigh_chosen(of, got.expert_ids, cfg.renormalise, cfg.scale)

  np.testing.assert_allclose(got.weights, weights(logits), rtol=3e-6, atol=1e-37)
  check_slopes(from_weights[0], lambda z: weights(z) * to_weights(name), logits)
  somebody = got.expert_ids < E
  assert not got.weights[~somebody].any(), 'nobody weighs nothing'
  if cfg.renormalise:
    np.testing.assert_allclose(got.weights.sum(-1), cfg.scale * somebody.any(-1), rtol=1e-6)
  assert not np.any(from_weights[1]) and not np.any(from_probs[1]), (
    'the bias chooses; it has no gradient'
  )
  near = 2e-6 * max(1.0, np.abs(scores).max())
  np.testing.assert_allclose(got.margin, oracle.margin(scores + bias, got.expert_ids), atol=near)
  np.testing.assert_array_equal(got.best_ids, np.argsort(-scores, -1, stable=True)[..., :K])
  assert not got.likely.any() and got.router.shape == (0, E)


def test_every_way_to_weigh_is_tested() -> None:
  assert {cfg.weigh for cfg in WEIGHING.values()} == set(WEIGHTS)
  for name in SELECTIONS:
    assert {weighing_of(name, score_fn) for score_fn in SCORE_FNS} == set(WEIGHING)
  assert set(oracle.SELECTIONS) == set(SELECTIONS)


@functools.partial(jax.jit, compiler_options=QUICK)
def everyones_choice(logits: Array, bias: Array, tokens: Tokens) -> dict[str, Array]:
  return {
    name: route(logits, bias, config(name, 'sigmoid', 'scores'), tokens).expert_ids
    for name in SELECTIONS
  }


def changed_after(t: int) -> tuple[Array, Array, Tokens, Tokens, np.ndarray]:
  """Two batches that are the same up to place t."""
  rng = np.random.default_rng(t)
  one, two = (rng.normal(size=(B, S, E)).astype(np.float32) for _ in range(2))
  ids, others = (rng.integers(0, 1000, (B, S)).astype(np.int32) for _ in range(2))
  tokens = Tokens(
    ids, np.ones((B, S), bool), np.ones((B, S), np.int32), np.arange(B, dtype=np.int32)
  )
  later = np.arange(S) > t
  return (
    one,
    np.where(later[:, None], two, one),
    tokens,
    tokens._replace(ids=np.where(later, others, ids)),
    ~later,
  )


@everywhere
def test_a_selection_is_as_causal_as_it_says(name: str) -> None:
  differs = False
  for t in (1, 3):
    one, two, tokens, others, before = changed_after(t)
    a, b = (
      everyones_choice(z, jnp.zeros(E), them)[name] for z, them in ((one, tokens), (two, others))
    )
    differs |= not np.array_equal(a[:, before], b[:, before])
    assert name == 'uniform' or not np.array_equal(a, b)
  assert differs is not SELECTIONS[name].causal


@everywhere
def test_only_the_selections_that_say_so_take_the_bias(name: str) -> None:
  one, _, tokens, _, _ = changed_after(0)
  a, b = (
    everyones_choice(one, bias, tokens)[name]
    for bias in (jnp.zeros(E), jnp.asarray([0.0, 0, 0, 9]))
  )
  assert np.array_equal(a, b) is not SELECTIONS[name].takes_bias


@everywhere
def test_rows_do_not_see_each_other_and_nobody_sees_padding(name: str) -> None:
  logits, bias, tokens = batch()
  plain = everyones_choice(logits, bias, tokens)[name]
  turned = tokens._replace(
    ids=tokens.ids[::-1], mask=tokens.mask[::-1], segments=tokens.segments[::-1]
  )
  np.testing.assert_array_equal(everyones_choice(logits[::-1], bias, turned)[name][::-1], plain)
  other = np.where(tokens.mask[..., None], logits, np.float32(7) * np.arange(E, dtype=np.float32))
  ids = everyones_choice(other, bias, tokens._replace(ids=np.where(tokens.mask, tokens.ids, 3)))[
    name
  ]
  np.testing.assert_array_equal(ids[tokens.mask], plain[tokens.mask])


def test_each_expert_chooses_its_share_of_each_row() -> None:
  _, _, tokens = batch()
  for score_fn in SCORE_FNS:
    ids = measured('expert_choice')[score_fn].routing.expert_ids
    for b, n in enumerate(tokens.mask.sum(1)):
      np.testing.assert_array_equal(
        np.bincount(ids[b].ravel(), minlength=E + 1)[:E], np.full(E, np.ceil(n * K / E))
      )
  ids = measured('expert_choice')['sigmoid'].routing.expert_ids[CASES.index('equal')]
  assert (ids[:3] < E).all() and (ids[3:] == E).all(), 'ties go to the first tokens'


def max_vio(ids: np.ndarray, experts: int) -> float:
  return float(oracle.max_vio(np.bincount(np.ravel(ids), minlength=experts)))


def test_sinkhorn_evens_the_load_of_skewed_scores() -> None:
  rng = np.random.default_rng(5)
  logits = (rng.normal(size=(B, S, E)) + [3, 1, 0, -1]).astype(np.float32)
  tokens = batch()[2]._replace(mask=np.ones((B, S), bool))
  chosen = everyones_choice(logits, jnp.zeros(E), tokens)
  assert max_vio(chosen['top_k'], E) > 0.7 and max_vio(chosen['sinkhorn'], E) < 0.25


def test_hash_is_of_the_token_alone_distinct_and_spread() -> None:
  cfg, vocabulary = RouterConfig(16, 4, selection='hash'), 8192
  ids = jnp.arange(vocabulary, dtype=jnp.int32).reshape(64, -1)
  tokens = Tokens(ids, ids >= 0, jnp.ones_like(ids), jnp.arange(64))
  choose = jax.jit(
    lambda t: SELECTIONS['hash'].choose(jnp.zeros((64, 128, 16)), jnp.zeros((64, 128, 16)), t, 4),
    compiler_options=QUICK,
  )
  chosen = np.asarray(choose(tokens))
  turned = np.asarray(choose(tokens._replace(ids=ids[::-1, ::-1])))
  np.testing.assert_array_equal(turned[::-1, ::-1], chosen)
  chosen = chosen.reshape(-1, cfg.top_k)
  assert all(len(set(row)) == cfg.top_k for row in chosen.tolist())
  for k in range(cfg.top_k):  # 512 a slot and expert: four standard deviations are 0.17 of that
    assert max_vio(chosen[:, k], 16) < 0.17
  # Neighbouring tokens share experts no more often than chance: K² / E of them.
  shared = np.mean(
    [len(set(a) & set(b)) for a, b in zip(chosen[:-1].tolist(), chosen[1:].tolist())]
  )
  assert abs(shared - 1) < 0.05


def test_uniform_is_even_and_distinct() -> None:
  ids = measured('uniform')['softmax'].routing.expert_ids
  for row in ids:  # 12 copies, 4 experts
    np.testing.assert_array_equal(np.bincount(row.ravel(), minlength=E), np.full(E, S * K // E))
    assert (row[:, 0] != row[:, 1]).all()


@functools.partial(jax.jit, static_argnames='name', compiler_options=QUICK)
def replay(logits: Array, bias: Array, tokens: Tokens, name: str) -> Measured:
  return measure(
    logits, bias, tokens, to_weights(name), config(name, 'sigmoid', weighing_of(name, 'sigmoid'))
  )


@pytest.mark.parametrize('name', ['top_k', 'expert_choice'])
def test_recorded_experts_are_used_again_and_weighed_anew(name: str) -> None:
  logits, bias, tokens = batch()
  first = measured(name)['sigmoid']
  recorded = tokens._replace(replayed=first.routing.expert_ids)
  again = replay(logits, bias, recorded, name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), first, again)
  other = np.random.default_rng(6).normal(size=logits.shape).astype(np.float32)
  moved = replay(other, -bias, recorded, name)
  np.testing.assert_array_equal(moved.routing.expert_ids, first.routing.expert_ids)
  log_s, cfg = oracle.log_scores(other, 'sigmoid'), WEIGHING[weighing_of(name, 'sigmoid')]
  want = oracle.weigh_chosen(log_s, recorded.replayed, cfg.renormalise, cfg.scale)
  np.testing.assert_allclose(moved.routing.weights, want, rtol=3e-6)
  np.testing.assert_array_equal(moved.routing.logits, other)


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
  swapped = draws(some_tokens(ROWS[::-1].copy(), 64, key))
  elsewhere = draws(some_tokens(ROWS, 64, jax.random.key(2)))
  for name, draw in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), draw, name)
    np.testing.assert_array_equal(longer[name][:, :64], draw, name)
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
  assert abs(noise.mean()) < 4 / np.sqrt(noise.size) and abs(noise.var() - 1) < 4 * np.sqrt(
    2 / noise.size
  )


def test_jitter_keeps_the_dtype_and_off_is_off() -> None:
  x = jnp.ones((4, 8, 2), jnp.bfloat16)
  tokens = some_tokens(ROWS, 8, jax.random.key(0))
  assert jittered(x, tokens, 0.1).dtype == jnp.bfloat16 and jittered(x, tokens, 0.0) is x


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
  logits, tokens = (
    rng.normal(size=(4, 64, 8)).astype(np.float32),
    some_tokens(ROWS, 64, jax.random.key(1)),
  )
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
  draw = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (256,)))(row_keys(tokens, SECOND)))
  kept = oracle.second_kept(weights, draw)
  np.testing.assert_array_equal(got.expert_ids, np.where(kept, best, 8))
  np.testing.assert_allclose(got.weights, 2 * np.where(kept, weights, 0), rtol=3e-6)
  chance = np.minimum(1, 2 * weights[..., 1])
  assert (got.expert_ids[..., 0] < 8).all() and (got.expert_ids[..., 1] < 8)[chance == 1].all()
  assert renormalise or (chance == 1).sum() > 1000
  deviation = np.sqrt((chance * (1 - chance)).sum())
  assert 0 < deviation and abs(kept[..., 1].sum() - chance.sum()) < 4 * deviation
  # A record is used as it is: another key draws nobody out of it.
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
  np.testing.assert_array_equal(
    chance[0, :8].sum(-1), 2
  )  # without noise: the two best, for certain


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
