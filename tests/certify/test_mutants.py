"""Every line of the contract fails for the mistake that it is there for.

`make mutants` runs all mutants; here is one for each line, the cheapest.
"""

from collections.abc import Iterator

import pytest

from moejax.certify import contract
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.report import marked_text
from tests.support.first_failure import first_failure
from tests.support.mutant_table import DOCS
from tests.support.mutants import MUTANTS

PATCH = pytest.MonkeyPatch
# Line -> one of its mutants that the line finds early.
SAMPLES = {
  'oracle': 'two softmaxes',
  'balance': 'wrong K factor',
  'invariance': 'micro-batches weigh evenly',
  'logged': 'gradient of the embedding alone',
  'probabilities': 'bias inside P',
  'bias': 'bias the wrong way',
  'padding': 'padded tokens counted',
  'shrink': 'tiny epsilon',
  'layers': 'pooled layers',
  'causality': 'expert choice labelled causal',
  'trained': 'straight cosine',
  'decoding': 'drafts not truncated',
  'large': 'packed keys without limit',
  'metrics': 'statistics of the last micro-batch',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SAMPLES.values())
def test_a_mutant_is_caught_by_its_line(name: str, monkeypatch: PATCH) -> None:
  MUTANTS[name].apply(monkeypatch)
  caught = first_failure(MUTANTS[name].line)
  assert caught, f'{name}: line {MUTANTS[name].line} passes'
  assert caught.what != contract.UNEXPECTED, (
    f'{name} breaks the line instead of failing it: {caught.where}'
  )


@pytest.mark.slow
def test_nothing_that_was_compiled_outlives_a_mutant(monkeypatch: PATCH) -> None:
  """In one process: the line passes, fails with the mutant, and passes again without it."""
  mutant = MUTANTS['wrong K factor']
  assert first_failure(mutant.line) is None
  with monkeypatch.context() as patch:
    mutant.apply(patch)
    assert first_failure(mutant.line)
  assert first_failure(mutant.line) is None


def test_every_line_has_a_sample_of_its_own_and_every_mutant_a_line_and_a_description() -> None:
  assert list(SAMPLES) == list(contract.LINES)
  assert all(MUTANTS[name].line == line for line, name in SAMPLES.items())
  descriptions = [mutant.description for mutant in MUTANTS.values()]
  assert len(MUTANTS) > 60 and len(set(descriptions)) == len(MUTANTS)
  assert {mutant.line for mutant in MUTANTS.values()} == set(contract.LINES)


@pytest.mark.parametrize('name', MUTANTS)
def test_a_mutant_patches_what_there_is(name: str, monkeypatch: PATCH) -> None:
  MUTANTS[name].apply(monkeypatch)


def test_the_table_in_the_docs_has_every_mutant() -> None:
  rows = marked_text(DOCS, 'mutants').strip().splitlines()[2:]
  for row, (name, mutant) in zip(rows, MUTANTS.items(), strict=True):
    assert row.startswith(f'| {name} | {mutant.description} | {mutant.line} | '), row
    assert 'SURVIVES' not in row and contract.UNEXPECTED not in row


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
