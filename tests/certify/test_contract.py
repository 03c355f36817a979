"""The lines of the contract as they run."""

import pytest

from moejax.certify import contract
from moejax.certify.cases import Plan


def test_an_exception_is_a_check_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
  def broken(plan: Plan) -> None:
    raise ValueError('no such expert')

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', broken))
  result = contract.run_line('shrink', Plan(quick=True), contract.Silence())
  assert not result.passed and 'no such expert' in result.tightest.where
