"""A foreign loss or router is certified: right ones pass, and what is wrong with others is said."""

import numpy as np
import pytest

from moejax.certify.foreign.claim import EQUATIONS, Claim
from moejax.certify.foreign.equation import product, product_parts, promised_product
from moejax.certify.foreign.given import make_given
from moejax.moe.balance.losses import BALANCE_LOSSES
from tests.certify import foreign_losses as foreign
from tests.certify.certificate_samples import certify_quietly, failed, said

Array = np.ndarray


@pytest.mark.parametrize('like', sorted(BALANCE_LOSSES))
def test_the_oracle_passes_for_every_row(like: str) -> None:
  """In float64, with every line that makes sense for it."""
  certificate = certify_quietly(foreign.of_oracle(like, 2), like, num_experts=4, dtype='float64')
  assert certificate.passed, said(certificate)
  names = {result.name for result in certificate.results}
  assert {'value', 'gradient'} <= names
  assert ('shrink' in names) == EQUATIONS[like].is_product
  assert ('balance' in names) == (like != 'router_z')


def test_every_row_has_its_equation() -> None:
  assert EQUATIONS.keys() == BALANCE_LOSSES.keys()


@pytest.mark.parametrize('seed', range(3))
def test_right_functions_of_float32_pass(seed: int) -> None:
  for function in (foreign.sequence, foreign.own_choice, foreign.with_gradient):
    certificate = certify_quietly(function, num_experts=8, seed=seed)
    assert certificate.passed, said(certificate)
  certificate = certify_quietly(foreign.sigmoid_router, 'router', score_fn='sigmoid', seed=seed)
  # A sum of scores of exp(-50) is 1e-21, which a float32 still has.
  assert certificate.passed, said(certificate)


def test_what_is_not_taken_is_not_asked_and_said() -> None:
  def without_padding(logits: Array) -> np.floating:
    return foreign.own_choice(logits, np.ones(logits.shape[:2], bool))

  notes = said(certify_quietly(without_padding))
  assert 'padded rows' in notes and 'packed documents' in notes and 'ties' in notes


def test_parts_that_nobody_changed_are_the_oracle() -> None:
  for like, pooled in (('sequence', False), ('micro_batch', True), ('gshard', False)):
    row_sets = 1 if like == 'sequence' else 2
    claim = Claim(like, num_experts=4, layers=2, pooled=pooled, row_sets=row_sets, partition=2)
    takes = frozenset({'logits', 'expert_ids', 'mask', 'segment_ids'})
    for cases in make_given(claim, takes, 0, 'float64').values():
      for given in cases.values():
        value = product(product_parts(claim, given))
        assert value == pytest.approx(promised_product(claim, given), rel=1e-12)


def test_a_documented_factor_and_pooled_layers_pass_when_they_are_claimed() -> None:
  """transformers' loss: K at balance, f and P means over the tokens of all layers."""

  def pooled(logits: Array, mask: Array) -> np.floating:
    flat = logits.reshape(1, -1, logits.shape[-1])
    everywhere = np.tile(mask, (len(logits), 1)).reshape(1, -1)
    return 2 * foreign.sequence(flat, foreign.top(flat, 2), everywhere)

  claimed = certify_quietly(pooled, 'global_batch', layers=3, pooled=True, factor=2)
  assert claimed.passed, said(claimed)
  assert certify_quietly(pooled, 'global_batch', layers=1, factor=2).passed
  notes = said(certify_quietly(pooled, 'global_batch', layers=3, factor=2))
  assert 'explained: layers are pooled' in notes
  notes = said(certify_quietly(pooled, 'global_batch', layers=3))
  assert 'layers are pooled' in notes and '2 (K) times' in notes


def test_a_gradient_that_is_wrong_is_caught_and_its_factor_is_named() -> None:
  def halved(logits: Array, expert_ids: Array, mask: Array) -> tuple[np.floating, Array]:
    value, gradient = foreign.with_gradient(logits, expert_ids, mask)
    return value, gradient / 2

  def detached(logits: Array, expert_ids: Array, mask: Array) -> tuple[np.floating, Array]:
    return foreign.sequence(logits, expert_ids, mask), np.zeros_like(logits)

  def leaking(logits: Array, expert_ids: Array, mask: Array) -> tuple[np.floating, Array]:
    value, gradient = foreign.with_gradient(logits, expert_ids, mask)
    return value, gradient + np.where(mask, 0, 1e-4)[..., None].astype(np.float32)

  for function, what in ((halved, '0.5 times'), (detached, 'the gradient is 0'), (leaking, '')):
    certificate = certify_quietly(function)
    assert failed(certificate) == {'gradient'} and what in said(certificate), said(certificate)


def test_differences_are_of_float32_where_a_function_keeps_no_more() -> None:
  def rounding(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
    return foreign.sequence(logits.astype(np.float32), expert_ids, mask)

  def scaled(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
    return rounding(logits, expert_ids, mask) * np.float32(1.01)

  tolerances = []
  for function in (rounding, foreign.sequence):
    certificate = certify_quietly(function)
    assert certificate.passed
    tolerances.append(certificate.results[1].checks[0].tolerance)
  assert tolerances == [1e-3, 1e-6]
  assert 'gradient' in failed(certify_quietly(scaled))


def test_no_finite_value_of_odd_inputs_is_a_failure_with_its_remedy() -> None:
  def of_nothing(logits: Array, expert_ids: Array, mask: Array) -> float:
    return float(foreign.sequence(logits, expert_ids, mask)) if mask.any() else float('nan')

  def raising(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
    if not mask.any():
      raise ZeroDivisionError('no token')
    return foreign.sequence(logits, expert_ids, mask)

  for function, what in ((of_nothing, 'nan for 0'), (raising, 'ZeroDivisionError: no token')):
    certificate = certify_quietly(function)
    notes = said(certificate)
    assert failed(certificate) == {'value'} and what in notes
    assert 'no finite value of nothing: divide by max(sum, 1)' in notes
