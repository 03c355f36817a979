"""The lines of the contract as they run."""

from collections.abc import Iterator

import pytest

from moejax.certify import contract
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst


def test_an_exception_is_a_check_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
  def broken(plan: Plan) -> None:
    raise ValueError('no such expert')

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', broken))
  result = contract.run_line('shrink', Plan(quick=True), contract.Silence())
  assert not result.passed and 'no such expert' in result.tightest.where


def test_of_several_seeds_a_check_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
  def line(plan: Plan) -> Iterator[Check | str]:
    worst = Worst('a distance', 5.0, 'why')
    worst.see('a case', {3: 1.0, 4: 6.0, 5: 2.0}[plan.seed])
    yield f'seed {plan.seed}'
    yield worst.check()

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', line))
  found = contract.certify(['shrink'], quick=True, seeds=range(3, 6))
  (result,) = found.results
  assert result.checks == (Check('a distance', 6.0, 5.0, 'why', 'a case; seed 4', 3),)
  assert result.notes == ('seed 3',) and not found.passed
  command = 'python -m moejax.certify --quick --only shrink --seed 3 --seeds 3'
  assert found.about['command'] == command and found.about['seed'] == '3 to 5'
