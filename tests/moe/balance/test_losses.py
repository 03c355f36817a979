"""Balance losses against the oracle, values and gradients, and what must leave them as they are."""

import itertools

import jax
import numpy as np
import pytest

from moejax.certify.batches import B, Case, S
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import codebases as oracle_codebases
from moejax.config import ConfigError
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
  CODEBASES,
  convert_coefficient,
)
from moejax.moe.routing import RouterConfig
from tests.moe.balance.loss_cases import (
  ALL,
  CANCELS,
  EVERY,
  MAIN,
  PAIRS,
  QUICKLY,
  SIGMOID,
  VARYING,
  Row,
  cases,
  measure,
  measured,
  router,
  routers,
)
from tests.moe.balance.loss_oracle import log_scores, normalised, one_by_one, wanted
from tests.support import oracle

# Each number of experts once, and each K; the certificate takes all of them together.
SHAPES = [router(4, 1, 'softmax'), router(8, 8, 'sigmoid'), router(64, 8, 'sqrt_softplus')]
SHAPES += [router(256, 2, 'softmax')]


@routers(MAIN)
def test_the_oracle_of_many_tokens_is_the_oracle(cfg: RouterConfig) -> None:
  for label, case in cases(8).items():
    ids = oracle.route(
      case.logits, case.bias, top_k=2, score_fn=cfg.score_fn, num_groups=2
    ).expert_ids
    for row, found in zip(QUICKLY, wanted(QUICKLY, case, cfg, ids)(case.logits), strict=True):
      np.testing.assert_allclose(
        found, one_by_one(row, case, cfg, ids), rtol=1e-10, atol=1e-12, err_msg=f'{label} {row}'
      )


def check_against_oracle(cfg: RouterConfig, table: tuple[Row, ...], stretch: int = 1) -> None:
  for label, case in cases(cfg.num_experts, stretch).items():
    values, gradients, to_bias, routing = measured(cfg, label, table, stretch)
    ids = oracle.route(
      case.logits,
      case.bias,
      top_k=cfg.top_k,
      score_fn=cfg.score_fn,
      num_groups=cfg.num_groups,
      top_groups=1,
    ).expert_ids
    np.testing.assert_array_equal(routing.expert_ids, ids)
    f = wanted(table, case, cfg, ids)
    direction = np.random.default_rng(1).normal(size=case.logits.shape)
    slopes = oracle.slope(f, case.logits, direction)
    for row, value, gradient, want, slope in zip(
      table, values, gradients, f(case.logits), slopes, strict=True
    ):
      about = f'{label} {row}'
      # What varies around 0 is a difference of numbers near 1, and so exact: to 1e-7 of them.
      np.testing.assert_allclose(
        value, want, rtol=1e-6, atol=1e-7 * (row.name in VARYING), err_msg=about
      )
      gradient = gradient.astype(np.float64)
      np.testing.assert_allclose(
        (gradient * direction).sum(),
        slope,
        rtol=1e-5,
        atol=1e-5 * np.linalg.norm(gradient) + 3e-8,
        err_msg=about,
      )
      assert not gradient[~case.mask].any(), f'{about}: a token that does not count has a gradient'
    assert not to_bias.any(), f'{label}: the bias has a gradient'


@routers(MAIN)
def test_value_and_gradient_are_the_oracles(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, QUICKLY)


@pytest.mark.slow
@routers(MAIN)
def test_every_switch_of_every_loss_with_every_other(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, ALL)


@pytest.mark.slow
@routers(SHAPES)
def test_every_shape(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, QUICKLY, stretch=max(1, cfg.num_experts // 32))


def test_all_losses_are_looked_at() -> None:
  assert (
    {row.name for row in QUICKLY} | {'simbal'}
    == {row.name for row in ALL} | {'simbal'}
    == set(BALANCE_LOSSES)
  )
  for one, other in itertools.combinations(range(4), 2):
    assert {(row[one], row[other]) for row in PAIRS} == {(row[one], row[other]) for row in EVERY}, (
      one,
      other,
    )
  assert len(set(EVERY)) == 4 * 3 * 2 * 3


@routers(MAIN)
def test_every_entry_of_the_gradient_is_the_finite_difference(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  _, gradients, _, routing = measured(cfg, 'holes')
  f = wanted(QUICKLY, case, cfg, routing.expert_ids)
  want = np.zeros(gradients.shape)
  for at in zip(*np.nonzero(np.broadcast_to(case.mask[..., None], case.logits.shape))):
    step = np.zeros(case.logits.shape)
    step[at] = 1
    want[(slice(None), *at)] = oracle.slope(f, case.logits, step)
  for row, got, one in zip(QUICKLY, gradients, want, strict=True):
    np.testing.assert_allclose(
      got, one, rtol=1e-5, atol=1e-5 * np.abs(one).max() + CANCELS, err_msg=str(row)
    )


@routers(MAIN)
def test_renaming_experts_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together
  renamed = measure(case.logits[..., old_name], case.bias[old_name], case.mask, case.segments, cfg)
  np.testing.assert_allclose(renamed[0], values, rtol=1e-6)
  for got, want in zip(renamed[1], gradients[..., old_name], strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max() + CANCELS)


@routers(MAIN)
def test_what_does_not_count_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  garbage = np.random.default_rng(2).normal(scale=17, size=case.logits.shape).astype(np.float32)
  got = measure(np.where(case.mask[..., None], case.logits, garbage), *case[1:], cfg)
  np.testing.assert_array_equal(got[0], values)
  np.testing.assert_array_equal(got[1], gradients)


@pytest.mark.slow
def test_rows_cut_short_are_rows_masked() -> None:
  case = cases(8)['holes']
  masked = case._replace(mask=case.mask & (np.arange(S) < 5))
  cut = Case(*(a[:, :5] if np.ndim(a) > 1 else a for a in masked))
  np.testing.assert_allclose(measure(*cut, SIGMOID)[0], measure(*masked, SIGMOID)[0], rtol=1e-6)


@routers(MAIN)
def test_bias_is_in_no_probability(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients, _, routing = measured(cfg, 'holes')
  other = jax.tree.map(np.asarray, measure(case.logits, -case.bias, case.mask, case.segments, cfg))
  assert not np.array_equal(routing.expert_ids, other[3].expert_ids)
  follows = np.array(
    [row.assignment != 'unbiased' or row.name in ('gshard', 'importance') for row in QUICKLY]
  )
  np.testing.assert_array_equal(values[~follows], other[0][~follows])
  np.testing.assert_array_equal(gradients[~follows], other[1][~follows])
  assert (np.abs(values - other[0])[follows] > 1e-6).all(), 'f does follow what was dispatched'


# Coefficients of others.
def layers_of_a_model(alike: bool) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities [L, B, S, E] and expert_ids [L, B, S, K] of three layers.

  The layers are alike in counts, or each has its own.
  """
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, B, S, 8)) + 2 * rng.normal(size=(1 if alike else 3, 1, 1, 8))
  ids = np.argsort(-logits, axis=-1, kind='stable')[..., :2]
  if alike:
    ids = np.broadcast_to(ids[:1], ids.shape)
  return normalised(log_scores(logits, 'softmax')), ids


@pytest.mark.parametrize('codebase', sorted(CODEBASES))
def test_a_converted_coefficient_is_the_same_pull(codebase: str) -> None:
  """What a codebase adds to its loss, with its alpha, is what ours adds with the converted one."""
  theirs, scope = oracle_codebases.CODEBASES[codebase]
  # Hugging Face pools layers: only of layers that are alike is its loss the same.
  probs, ids = layers_of_a_model(alike=codebase == 'huggingface')
  mask = np.ones((B, S), bool)
  sets = oracle_balance.sets_of(scope or 'global_batch', np.ones((B, S), np.int32))
  ours = np.mean([oracle_balance.probability_losses(p, i, mask, sets) for p, i in zip(probs, ids)])
  alpha = 0.02
  found = convert_coefficient(codebase, alpha, top_k=2, num_moe_layers=3) * ours
  np.testing.assert_allclose(found, alpha * theirs(probs, ids), rtol=1e-12)
  assert abs(ours - 1) > 0.05


def test_hugging_face_pools_layers_and_so_cannot_be_converted_for_layers_that_differ() -> None:
  """Two layers collapsed onto opposite experts are, pooled, a perfect balance: K.

  Ours sees both collapse: E/K.
  """
  probs, ids = np.zeros((2, B, S, 4)), np.zeros((2, B, S, 2), int)
  probs[0, ..., :2] = probs[1, ..., 2:] = 0.5
  ids[0], ids[1] = [0, 1], [2, 3]
  sets = oracle_balance.sets_of('global_batch', np.ones((B, S), np.int32))
  ours = [
    oracle_balance.probability_losses(p, i, np.ones((B, S), bool), sets)[0]
    for p, i in zip(probs, ids)
  ]
  np.testing.assert_allclose(ours, 4 / 2)
  np.testing.assert_allclose(
    oracle_codebases.huggingface(probs, ids), 2, err_msg='K, as at balance'
  )


def test_an_unknown_codebase_is_named_with_those_that_are_known() -> None:
  assert set(CODEBASES) == set(oracle_codebases.CODEBASES)
  with pytest.raises(
    ConfigError, match=r"codebase='nemo' is not one of \['huggingface', 'levanter', "
  ):
    convert_coefficient('nemo', 0.1, top_k=2, num_moe_layers=3)
