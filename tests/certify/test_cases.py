"""What a run of the certificate shares: its cache, its random numbers, its batches."""

import numpy as np

from moejax.certify.batches import B, S
from moejax.certify.cases import EP_GROUPS, MICRO_BATCHES, Plan, make_cases, router_name
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS


def test_a_key_is_made_once_a_plan() -> None:
  made = []

  def make() -> int:
    made.append(1)
    return len(made)

  plan, other = Plan(quick=True), Plan(quick=True)
  assert [plan.once('a', make), plan.once('a', make), plan.once('b', make)] == [1, 1, 2]
  assert other.once('a', make) == 3


def test_a_program_is_traced_anew_by_each_plan() -> None:
  def double(x: float, factor: int) -> float:
    traced.append(factor)
    return x * factor

  traced: list[int] = []
  for plan in (Plan(quick=True), Plan(quick=True)):
    for factor in (2, 3, 2):
      assert plan.program(double, factor)(2.0) == 2 * factor
  assert traced == [2, 3, 2, 3]


def test_quick_looks_at_every_score_function_and_selection() -> None:
  quick, whole = Plan(quick=True), Plan(quick=False)
  assert {cfg.score_fn for cfg in quick.token_choice()} == set(SCORE_FNS)
  assert {cfg.selection for cfg in quick.other_routers()} == set(SELECTIONS)
  assert set(quick.token_choice()) < set(whole.token_choice())
  assert set(quick.other_routers()) < set(whole.other_routers())


def test_cases_are_batches_of_one_shape_that_the_seed_decides() -> None:
  cases, again = make_cases(Plan(True, seed=1), 8), make_cases(Plan(True, seed=1), 8)
  other = make_cases(Plan(True, seed=2), 8)
  for label, case in cases.items():
    assert case.logits.shape == (B, S, 8) and case.mask.shape == case.segments.shape == (B, S)
    assert case.logits.dtype == case.bias.dtype == np.float32
    assert all(np.array_equal(a, b) for a, b in zip(case, again[label]))
    # A token that counts is one of a document.
    assert (case.segments[case.mask] > 0).all()
  assert not np.array_equal(cases['plain'].logits, other['plain'].logits)
  assert not B % MICRO_BATCHES and not B % EP_GROUPS


def test_a_router_is_named_by_what_is_unusual() -> None:
  assert router_name(RouterConfig(8, 2, 'sigmoid', num_groups=2)) == 'sigmoid E8 K2'
  assert router_name(RouterConfig(4, 1, noisy=True)) == 'softmax E4 K1 noisy=True'
