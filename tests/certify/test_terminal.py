"""A certificate on the terminal."""

import pytest

from moejax.certify import terminal
from moejax.certify.checks import Check
from tests.certify.certificate_samples import BAD, EXACT, GOOD, certificate


def test_a_long_bar_is_a_wide_margin() -> None:
  assert terminal.bar(EXACT) == '█' * terminal.BAR and terminal.bar(BAD) == ''
  assert terminal.bar(Check('x', 1e-8, 1e-5, '', '', 1)) == '███'
  assert len(terminal.bar(Check('x', 9e-6, 1e-5, '', '', 1))) <= 1


def test_a_failed_check_says_where_and_why(capsys: pytest.CaptureFixture) -> None:
  with terminal.Terminal() as listener:
    listener.check('oracle', GOOD)
    listener.check('oracle', BAD)
  passed, failed, worst = capsys.readouterr().out.splitlines()
  assert passed.startswith('✓ oracle') and len(passed) <= 80 and failed.startswith('✗ oracle')
  assert worst == '  worst of 3: E4; allowed: whole'


def test_the_table_has_a_cell_for_every_column() -> None:
  for check, margin in ((GOOD, terminal.bar(GOOD)), (BAD, 'FAILED')):
    cells = terminal.table_cells(certificate(check).results[0])
    assert len(cells) == len(terminal.COLUMNS) and str(cells[6]) == margin
