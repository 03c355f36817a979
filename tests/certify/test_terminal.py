"""A certificate on the terminal."""

from moejax.certify import terminal
from moejax.certify.checks import Check
from tests.certify.certificate_samples import BAD, EXACT


def test_a_long_bar_is_a_wide_margin() -> None:
  assert terminal.bar(EXACT) == '█' * terminal.BAR and terminal.bar(BAD) == ''
  assert terminal.bar(Check('x', 1e-8, 1e-5, '', '', 1)) == '███'
  assert len(terminal.bar(Check('x', 9e-6, 1e-5, '', '', 1))) <= 1
