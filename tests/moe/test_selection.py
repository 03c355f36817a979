"""Every row of SELECTIONS against the oracle, and who may look ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.routing import SCORE_FNS, WEIGHTS, RouterConfig, route
from moejax.moe.selection import (
  SELECTIONS,
  Tokens,
)
from tests.moe.selection_cases import (
  CASES,
  TO_PROBS,
  WEIGHING,
  B,
  E,
  K,
  Measured,
  S,
  batch,
  config,
  everywhere,
  measure,
  measured,
  to_weights,
  weighing_of,
)
from tests.moe.slopes import check_slopes
from tests.support import oracle
from tests.support.quick import QUICK


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
      # [S, E], who has whom
      ones, others = ((ids[b][..., None] == np.arange(E)).any(1) for ids in (got, want))
      np.testing.assert_array_equal(ones.sum(0), others.sum(0), case)
      np.testing.assert_allclose(
        (ones[mask[b]] * rows).sum(0), (others[mask[b]] * rows).sum(0), atol=S * near, err_msg=case
      )
      ranked = np.take_along_axis(
        np.pad(log_s[b], ((0, 0), (0, 1)), constant_values=-np.inf), got[b], -1
      )
      assert (ranked[:, :-1] >= ranked[:, 1:] - near).all(), (
        f'{case}: not best first, unassigned last'
      )
    elif mask[b].any():
      plan = oracle.sinkhorn_plan(rows)
      ones, others = (np.take_along_axis(plan, ids[b, mask[b]], -1) for ids in (got, want))
      np.testing.assert_allclose(ones, others, rtol=0, atol=20 * near, err_msg=case)
    if case in ('plain', 'padded', 'holes', 'one counts', 'skewed', 'low'):
      np.testing.assert_array_equal(got[b, mask[b]], want[b, mask[b]], case)


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
@everywhere
def test_selection_weights_and_gradients_are_the_oracles(name: str, score_fn: str) -> None:
  given, bias, tokens = batch()
  mask_BS1 = tokens.mask[..., None]
  logits = np.where(mask_BS1, given, 0)  # what padding holds is taken for 0
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
  check_slopes(
    from_probs[0],
    lambda z: oracle.probabilities(np.where(mask_BS1, z, 0), score_fn) * TO_PROBS,
    given,
  )

  def weights(z: np.ndarray) -> np.ndarray:
    z = np.where(mask_BS1, z, 0)
    of = z if cfg.weigh == 'softmax' else oracle.log_scores(z, score_fn)
    return oracle.weigh_chosen(of, got.expert_ids, cfg.renormalise, cfg.scale)

  np.testing.assert_allclose(got.weights, weights(logits), rtol=3e-6, atol=1e-37)
  check_slopes(from_weights[0], lambda z: weights(z) * to_weights(name), given)
  assigned = got.expert_ids < E
  assert not got.weights[~assigned].any(), 'unassigned weighs nothing'
  if cfg.renormalise:
    np.testing.assert_allclose(got.weights.sum(-1), cfg.scale * assigned.any(-1), rtol=1e-6)
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


@everywhere
def test_token_by_token_a_row_is_routed_as_it_is_whole(name: str) -> None:
  """As with a cache: each chunk knows the places of its tokens, and padding takes none.

  What is not causal sees no more than the chunk: a prompt is routed as a row of that length, and
  the token after it as a row of one token.
  """
  logits, tokens = changed_after(0)[0], changed_after(0)[2]
  no_bias, places = jnp.zeros(E), np.tile(np.arange(S, dtype=np.int32), (B, 1))

  def part(first: int, last: int) -> np.ndarray:
    ids, mask = tokens.ids[:, first:last], tokens.mask[:, first:last]
    chunk = tokens._replace(ids=ids, mask=mask, segments=mask.astype(np.int32))
    chunk = chunk._replace(places=places[:, first:last])
    return np.asarray(everyones_choice(logits[:, first:last], no_bias, chunk)[name])

  whole = np.asarray(everyones_choice(logits, no_bias, tokens)[name])
  prompt, token = part(0, 3), part(5, 6)
  if SELECTIONS[name].causal:
    np.testing.assert_array_equal(np.concatenate([prompt, part(3, 6)], axis=1), whole)
    np.testing.assert_array_equal(token, whole[:, 5:])
  else:
    alone = tokens._replace(ids=None, mask=tokens.mask[:, :3], segments=tokens.segments[:, :3])
    choose, score = SELECTIONS[name].choose, jax.nn.log_sigmoid(logits[:, :3])
    np.testing.assert_array_equal(prompt, choose(score, score, alone, K))
    if name == 'expert_choice':  # each expert takes its share of one token, rounded up
      assert (np.sort(token) == np.arange(E)).all()
  # Padded on the left by two columns.
  padded_ids = np.pad(tokens.ids[:, :4], ((0, 0), (2, 0)))
  mask = np.pad(tokens.mask[:, :4], ((0, 0), (2, 0)))
  shifted = np.pad(logits[:, :4], ((0, 0), (2, 0), (0, 0)), constant_values=np.nan)
  padded = tokens._replace(ids=padded_ids, mask=mask, segments=mask.astype(np.int32))
  found = np.asarray(everyones_choice(shifted, no_bias, padded)[name])
  np.testing.assert_array_equal(found[:, 2:], part(0, 4))


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
  mask = batch()[2].mask
  for row, counts in zip(ids, mask):
    load = np.bincount(row[counts].ravel(), minlength=E)
    assert load.sum() == counts.sum() * K and np.ptp(load) <= 1, 'even to one copy, padded or not'
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
  # Another program: gradients are differences of float32 numbers of up to 0.3, 3e-8 apart.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-9), first, again)
  other = np.random.default_rng(6).normal(size=logits.shape).astype(np.float32)
  other[~tokens.mask] = 0
  moved = replay(other, -bias, recorded, name)
  np.testing.assert_array_equal(moved.routing.expert_ids, first.routing.expert_ids)
  log_s, cfg = oracle.log_scores(other, 'sigmoid'), WEIGHING[weighing_of(name, 'sigmoid')]
  want = oracle.weigh_chosen(log_s, recorded.replayed, cfg.renormalise, cfg.scale)
  np.testing.assert_allclose(moved.routing.weights, want, rtol=3e-6)
  np.testing.assert_array_equal(moved.routing.logits, other)
