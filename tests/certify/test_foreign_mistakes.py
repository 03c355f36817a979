"""Known mistakes of foreign losses and routers: each is caught, and named in the certificate."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from moejax.certify.foreign.call import OFFERED
from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.equation import product_parts, promised
from moejax.certify.foreign.given import make_given
from moejax.certify.foreign.mistakes import mistakes_of
from moejax.certify.oracle.codebases import CODEBASES
from moejax.certify.oracle.routing import probabilities
from moejax.moe.balance import convert_coefficient
from tests.certify import foreign_losses as foreign
from tests.certify.certificate_samples import certify_quietly, failed, said

Array = np.ndarray


def times_k(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  return 2 * foreign.sequence(logits, expert_ids, mask)


def chosen_alone(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  p = foreign.softmax(logits)
  kept = p * (expert_ids[..., None] == np.arange(p.shape[-1])).any(-2)
  total = np.maximum(kept.sum(-1, keepdims=True), kept.dtype.type(1e-30))
  return foreign.mean_of_rows(kept / total, expert_ids, mask)


def padding_counted(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  return foreign.sequence(logits, expert_ids, np.ones_like(mask))


def divided_by_positions(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  rows = foreign.rows_loss(foreign.softmax(logits), expert_ids, mask) * mask.mean(1)
  return (rows.sum() / max(mask.any(1).sum(), 1)).astype(logits.dtype)


def softmax_twice(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  return foreign.sequence(foreign.softmax(logits), expert_ids, mask)


def in_bfloat16(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  import jax.numpy as jnp

  rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16).astype(jnp.float32))
  return foreign.sequence(rounded, expert_ids, mask)


def whole_batch(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  flat = (a.reshape(1, -1, *a.shape[2:]) for a in (logits, expert_ids, mask))
  return foreign.sequence(*flat)


def by_softmax(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  return foreign.sequence(logits, expert_ids, mask)


def softmax_of_scores(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  return foreign.sequence(foreign.sigmoid(logits), expert_ids, mask)


def raw_sigmoid(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  return foreign.mean_of_rows(foreign.sigmoid(logits), expert_ids, mask)


def with_epsilon(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  scores = foreign.sigmoid(logits)
  p = scores / (scores.sum(-1, keepdims=True) + scores.dtype.type(1e-20))
  return foreign.mean_of_rows(p, expert_ids, mask)


def bias_in_p(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  return foreign.sequence(foreign.sigmoid(logits) + bias, expert_ids, mask)


def dispatched(logits: Array, mask: Array, bias: Array) -> np.floating:
  ids = foreign.top(foreign.sigmoid(logits) + bias, 2)
  return foreign.mean_of_rows(foreign.normalised_sigmoid(logits), ids, mask)


def two_at_once(logits: Array, expert_ids: Array, mask: Array, bias: Array) -> np.floating:
  return foreign.sequence(logits, expert_ids, np.ones_like(mask))


OF_SOFTMAX: dict[Callable, str] = {
  times_k: '2 (K) times what it should be',
  chosen_alone: 'P sees only the chosen experts',
  padding_counted: 'padding is counted',
  divided_by_positions: 'divided by all positions',
  softmax_twice: 'softmax of a softmax',
  in_bfloat16: 'rounded to bfloat16',
  whole_batch: 'a set is the whole batch',
}
OF_SIGMOID: dict[Callable, str] = {
  by_softmax: 'P is the softmax in place of the normalised sigmoid',
  softmax_of_scores: 'P is the softmax of sigmoid scores',
  raw_sigmoid: 'P is the raw sigmoid',
  with_epsilon: 'an epsilon of 1e-20',
  bias_in_p: 'the bias is inside P (softmax of scores plus bias)',
  dispatched: 'f counts what was dispatched',
  two_at_once: 'P is the softmax in place of the normalised sigmoid; and padding is counted',
}
KNOWN = [(function, 'softmax', what) for function, what in OF_SOFTMAX.items()]
KNOWN += [(function, 'sigmoid', what) for function, what in OF_SIGMOID.items()]


@pytest.mark.parametrize(('function', 'score_fn', 'what'), KNOWN)
def test_a_known_mistake_is_caught_and_named(function: Callable, score_fn: str, what: str) -> None:
  certificate = certify_quietly(function, score_fn=score_fn)
  assert not certificate.passed and failed(certificate) - {'gradient'}
  assert what in said(certificate), said(certificate)
  assert 'no known mistake' not in said(certificate)


# Between them every mistake is one: what a claim has by right is none of it.
CLAIMS = (
  Claim('sequence', num_experts=4, score_fn='sigmoid', layers=2),
  Claim('global_batch', num_experts=4, num_groups=2, assignment='dispatched', layers=2),
  Claim('gshard', num_experts=4, score_fn='sqrt_softplus', row_sets=4, layers=2, pooled=True),
  Claim('micro_batch', num_experts=4, partition=2, row_sets=2),
  *(Claim(like, num_experts=4) for like in ('router_z', 'importance', 'load', 'simbal')),
)


def test_every_known_mistake_changes_values_and_each_in_its_own_way() -> None:
  """A mistake that no value shows would never be named; two that are alike would both be."""
  takes, seen, unseen = frozenset(OFFERED), set(), set()
  for claim in CLAIMS:
    inputs = [
      given for cases in make_given(claim, takes, 0, 'float64').values() for given in cases.values()
    ]
    values = {'': [promised(claim, given) for given in inputs]}
    parts = [product_parts(claim, given) for given in inputs]
    for what, mistake in mistakes_of(claim).items():
      if 'an epsilon' not in what:  # told apart by the lines of smaller scores, below
        values[what] = [mistake(claim, *both) for both in zip(inputs, parts)]
    for what, found in values.items():
      alike = {other for other in values if np.allclose(values[other], found, rtol=1e-5, atol=1e-5)}
      if '' in alike:
        unseen |= alike
      else:
        seen.add(what)
        assert alike == {what}, claim
  assert not unseen - seen - {''}, unseen - seen


@pytest.mark.parametrize('epsilon', [1e-12, 1e-9, 1e-6])
def test_an_epsilon_is_named_by_its_size(epsilon: float) -> None:
  def loss(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
    scores = foreign.sigmoid(logits)
    p = scores / (scores.sum(-1, keepdims=True) + scores.dtype.type(epsilon))
    return foreign.mean_of_rows(p, expert_ids, mask)

  notes = said(certify_quietly(loss, score_fn='sigmoid'))
  assert f'explained: an epsilon of {epsilon:g} in the sum that normalises scores\n' in notes


NAMED = {
  'huggingface': '2 (K) times',
  'levanter': '1.5 (L/K) times',
  'maxtext': '2 (K) times',
  'megatron': '3 (L) times',
  'olmo_core': '3 (L) times',
}


@pytest.mark.parametrize('codebase', sorted(CODEBASES))
def test_other_codebases_have_their_documented_factor_which_is_named(codebase: str) -> None:
  """The factor of the table of coefficients, on three layers."""
  theirs, scope = CODEBASES[codebase]

  def loss(logits: Array, expert_ids: Array) -> float:
    return theirs(probabilities(logits, 'softmax'), expert_ids)

  claim = {'like': scope or 'global_batch', 'layers': 3, 'pooled': not scope, 'dtype': 'float64'}
  factor = convert_coefficient(codebase, 1.0, top_k=2, num_moe_layers=3)
  claimed = certify_quietly(loss, factor=float(factor), **claim)
  assert claimed.passed, said(claimed)
  notes = said(certify_quietly(loss, **claim))
  assert f'the value is {NAMED[codebase]} what it should be' in notes
  assert f'pass factor={factor:g}' in notes
  assert f'the gradient is {factor:g} times' in notes


def wrong_router(change: str) -> Callable:
  """A router of sigmoid scores with this mistake."""

  def route(logits: Array, bias: Array) -> tuple[Array, Array]:
    scores = foreign.sigmoid(logits)
    by = foreign.softmax(logits) if change == 'softmax' else scores
    ids = foreign.top(by if change == 'no bias' else by + bias, 2)
    raw = scores + bias if change == 'bias in weights' else by
    weights = np.take_along_axis(raw, ids, -1)
    if change != 'raw':
      weights = weights / (weights.sum(-1, keepdims=True) + np.float32(1e-30))
    return ids, weights * (1 if change == 'no scale' else np.float32(2.5))

  return route


@pytest.mark.parametrize(
  ('change', 'line', 'what'),
  [
    ('none', '', ''),
    ('no bias', 'choice', 'the bias is left out of the choice'),
    ('softmax', 'choice', 'chosen by softmax in place of sigmoid'),
    ('softmax', 'weights', 'weights are made of softmax in place of sigmoid'),
    ('bias in weights', 'weights', 'the bias is inside the weights'),
    ('raw', 'weights', 'weights are not renormalised'),
    ('no scale', 'weights', 'the scale is dropped'),
  ],
)
def test_a_router_is_certified(change: str, line: str, what: str) -> None:
  certificate = certify_quietly(wrong_router(change), 'router', score_fn='sigmoid', scale=2.5)
  assert certificate.passed == (not line), said(certificate)
  assert not line or line in failed(certificate)
  assert what in said(certificate), said(certificate)


def test_an_epsilon_of_a_router_is_named() -> None:
  route = functools.partial(foreign.sigmoid_router, epsilon=1e-20)
  certificate = certify_quietly(route, 'router', score_fn='sigmoid')
  assert failed(certificate) == {'weights'}
  assert 'an epsilon of 1e-20 in the sum that renormalises weights' in said(certificate)


def test_groups_of_a_router_are_certified() -> None:
  def route(logits: Array, bias: Array, outside: float, size: int) -> tuple[Array, Array]:
    scores = foreign.sigmoid(logits)
    grouped = (scores + bias).reshape(*logits.shape[:2], 4, 2)
    worth = np.sort(grouped, axis=-1)[..., -size:].sum(-1)
    kept = np.zeros(worth.shape, bool)
    np.put_along_axis(kept, foreign.top(worth, 2), True, -1)
    ids = foreign.top(np.where(kept[..., None], grouped, outside).reshape(logits.shape), 3)
    weights = np.take_along_axis(scores, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True)

  claim = {'score_fn': 'sigmoid', 'num_groups': 4, 'top_groups': 2, 'top_k': 3}
  right = functools.partial(route, outside=-np.inf, size=2)
  assert certify_quietly(right, 'router', **claim).passed
  best = certify_quietly(functools.partial(route, outside=-np.inf, size=1), 'router', **claim)
  assert 'a group is worth the sum of its 1 best' in said(best)
