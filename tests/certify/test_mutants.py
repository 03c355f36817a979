"""Every line of the contract fails for the mistake that it is there for."""

from collections.abc import Iterator

import pytest

from moejax.certify import contract
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from tests.support.mutants import MUTANTS

PATCH = pytest.MonkeyPatch


class CaughtError(BaseException):
  """A case is beyond its tolerance. No Exception: of one of those a line would make a check."""

  def __init__(self, check: Check) -> None:
    super().__init__(check.what)
    self.check = check


def first_failure(line: str) -> Check | None:
  """The first check that a line, in its quick form, does not pass.

  One case beyond its tolerance fails a check, whatever the other cases are: the line stops there,
  which is most of the time that a mutant takes.
  """
  see = Worst.see

  def see_and_stop(worst: Worst, where: str, deviation: float) -> None:
    see(worst, where, deviation)
    check = worst.check()
    if not check.passed:
      raise CaughtError(check)

  with PATCH.context() as patch:
    patch.setattr(Worst, 'see', see_and_stop)
    try:
      for finding in contract.findings(line, Plan(quick=True)):
        # A check that saw no case has failed, too.
        if isinstance(finding, Check) and not finding.passed:
          return finding
    except CaughtError as caught:
      return caught.check
  return None


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_mutant_is_caught_by_its_line(name: str, monkeypatch: PATCH) -> None:
  MUTANTS[name].apply(monkeypatch)
  caught = first_failure(MUTANTS[name].line)
  assert caught, f'{name}: line {MUTANTS[name].line} passes'
  assert caught.what != contract.UNEXPECTED, (
    f'{name} breaks the line instead of failing it: {caught.where}'
  )
  print(f'{name}: {caught.what}, {caught.worst:.1e} of {caught.tolerance:.0e}, at {caught.where}')


@pytest.mark.slow
def test_nothing_that_was_compiled_outlives_a_mutant(monkeypatch: PATCH) -> None:
  """In one process: the line passes, fails with the mutant, and passes again without it."""
  mutant = MUTANTS['wrong K factor']
  assert first_failure(mutant.line) is None
  with monkeypatch.context() as patch:
    mutant.apply(patch)
    assert first_failure(mutant.line)
  assert first_failure(mutant.line) is None


def test_every_line_of_the_contract_is_there_and_has_a_mutant() -> None:
  assert len(contract.LINES) == 10 and {mutant.line for mutant in MUTANTS.values()} == set(
    contract.LINES
  )


def test_the_first_case_beyond_its_tolerance_ends_a_line(monkeypatch: PATCH) -> None:
  seen = []

  def line(plan: Plan) -> Iterator[Check]:
    near, far = Worst('near', 1.0, ''), Worst('far', 1.0, '')
    for case, deviation in (('a', 0.5), ('b', 2.0), ('c', 3.0)):
      seen.append(case)
      near.see(case, 0.0)
      far.see(case, deviation)
    yield near.check()
    yield far.check()

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', line))
  assert first_failure('shrink') == Check('far', 2.0, 1.0, '', 'b', 2) and seen == ['a', 'b']
  # Without the stop the same check fails, by its worst case.
  whole = contract.run_line('shrink', Plan(quick=True), contract.Silence())
  assert [check.what for check in whole.checks if not check.passed] == ['far']


@pytest.mark.parametrize(('cases', 'fails'), [(('a', 'b'), False), ((), True)])
def test_a_line_that_ends_has_passed_if_every_check_saw_a_case(
  cases: tuple[str, ...], fails: bool, monkeypatch: PATCH
) -> None:
  def line(plan: Plan) -> Iterator[Check | str]:
    worst = Worst('near', 1.0, '')
    for case in cases:
      worst.see(case, 0.5)
    yield 'a note'
    yield worst.check()

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', line))
  assert bool(first_failure('shrink')) == fails
