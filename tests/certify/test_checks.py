"""Checks of many cases: what passes, what fails, and what speaks for a line."""

import math

import pytest

from moejax.certify.checks import Check, Worst, allowed, number
from tests.certify.certificate_samples import BAD, EXACT, GOOD, NOTHING, certificate


def test_the_worst_of_many_is_kept_with_its_name() -> None:
  worst = Worst('a check', 1e-6, 'because')
  assert not worst.check().passed, 'a check that saw nothing has shown nothing'
  for where, deviation in (('a', 1e-7), ('b', -9e-7), ('c', 0.0)):
    worst.see(where, deviation)
  assert worst.check() == Check('a check', 9e-7, 1e-6, 'because', 'b', 3) and worst.check().passed
  worst.see('d', math.nan)
  assert worst.check().worst == math.inf and worst.check().where == 'd' and not worst.check().passed


def test_the_check_nearest_to_failing_speaks_for_its_line() -> None:
  assert certificate(EXACT, GOOD).results[0].tightest == GOOD and certificate(EXACT, GOOD).passed
  for bad in (BAD, NOTHING):
    found = certificate(GOOD, bad, EXACT)
    assert found.results[0].tightest == bad and not found.passed
  assert not certificate().passed, 'a line without a check has shown nothing'


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    (number(0.0), '0'),
    (number(2e-7), '2.0e-7'),
    (number(15.0), '1.5e1'),
    (number(math.inf), 'inf'),
    (allowed(0), 'exact'),
    (allowed(1e-6), '1e-6'),
    (allowed(1e-12), '1e-12'),
  ],
)
def test_a_deviation_is_short_to_read(text: str, wanted: str) -> None:
  assert text == wanted
