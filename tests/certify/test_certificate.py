"""The certificate: every line fails for the mistake that it is there for, and what it writes says so."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.certify import contract, report
from moejax.certify.__main__ import main
from moejax.certify.cases import Plan
from moejax.certify.report import Certificate, Check, Result, Worst
from tests.support.mutants import MUTANTS

PATCH = pytest.MonkeyPatch


def first_failure(line: str) -> Check | None:
  """The first check that a line, in its quick form, does not pass; what comes after it is not run."""
  for found in contract.found_by(line, Plan(quick=True)):
    if isinstance(found, Check) and not found.passed:
      return found
  return None


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_mutant_is_caught_by_its_line(name: str, monkeypatch: PATCH) -> None:
  MUTANTS[name].apply(monkeypatch)
  caught = first_failure(MUTANTS[name].line)
  assert caught, f'{name}: line {MUTANTS[name].line} passes'
  assert caught.what != 'runs to its end', (
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


@pytest.mark.slow
def test_the_command_certifies(tmp_path: Path) -> None:
  """The real command, in its quick form: all ten lines hold, without any mutant."""
  readme = tmp_path / 'README.md'
  readme.write_text(
    '\n'.join(['before', '<!-- certificate -->', '<!-- /certificate -->', 'after']) + '\n'
  )
  command = [
    sys.executable,
    '-m',
    'moejax.certify',
    '--quick',
    '--out',
    str(tmp_path),
    '--readme',
    str(readme),
  ]
  # Its own environment, as a user has it: the flags of the tests are not there to help.
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  run = subprocess.run(
    command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
  )
  assert run.returncode == 0, run.stdout + run.stderr
  found = json.loads((tmp_path / 'certificate.json').read_text())
  assert found['passed'] and found['devices'] == '8 x cpu' and found['quick']
  assert [line['number'] for line in found['lines']] == list(range(1, 11))
  assert all(line['passed'] and line['checks'] for line in found['lines'])
  assert all(check['cases'] and check['why'] for line in found['lines'] for check in line['checks'])
  causality = ' '.join(found['lines'][9]['notes'])
  assert causality.count('looks ahead, first in layer 1') == 3 and 'capacity by probs' in causality
  assert 'All lines hold' in readme.read_text() and readme.read_text().startswith('before\n')
  assert len(run.stdout.splitlines()) > 90 and max(map(len, run.stdout.splitlines()[:20])) <= 80


def test_every_line_of_the_contract_is_there_and_has_a_mutant() -> None:
  assert len(contract.LINES) == 10 and {mutant.line for mutant in MUTANTS.values()} == set(
    contract.LINES
  )


def test_an_unknown_line_is_an_error_that_names_the_known(
  capsys: pytest.CaptureFixture, monkeypatch: PATCH
) -> None:
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS'):
    monkeypatch.setenv(name, os.environ[name])  # what the command sets is taken back
  assert main(['--only', 'oracles']) == 2
  said = capsys.readouterr().err
  assert 'oracles' in said and all(name in said for name in contract.LINES)


def test_the_worst_of_many_is_kept_with_its_name() -> None:
  worst = Worst('a check', 1e-6, 'because')
  assert not worst.check().passed, 'a check that saw nothing has shown nothing'
  for where, deviation in (('a', 1e-7), ('b', -9e-7), ('c', 0.0)):
    worst.see(where, deviation)
  assert worst.check() == Check('a check', 9e-7, 1e-6, 'because', 'b', 3) and worst.check().passed
  worst.see('d', math.nan)
  assert worst.check().worst == math.inf and worst.check().where == 'd' and not worst.check().passed


def test_an_exception_is_a_check_that_failed(monkeypatch: PATCH) -> None:
  def broken(plan: Plan) -> None:
    raise ValueError('no such expert')

  monkeypatch.setitem(contract.LINES, 'shrink', contract.Line('a promise', broken))
  result = contract.run_line('shrink', Plan(quick=True), contract.Silence())
  assert not result.passed and 'no such expert' in result.tightest.where


def certificate(*checks: Check) -> Certificate:
  about = {
    'command': 'c',
    'seconds': 1.5,
    'devices': '8 x cpu',
    'commit': 'unknown',
    'seed': 0,
    'versions': {'jax': '1'},
    'covered': {'losses': ['sequence']},
  }
  return Certificate([Result('oracle', 1, 'is its equation', checks, 2.0, ('a note',))], about)


GOOD, EXACT = (
  Check('values', 2e-7, 1e-6, 'rounding', 'E8', 5),
  Check('counts', 0, 0, 'whole', 'E4', 3),
)
BAD, NOTHING = Check('counts', 1, 0, 'whole', 'E4', 3), Check('counts', 0, 1, 'whole', 'no case', 0)


def test_the_check_nearest_to_failing_speaks_for_its_line() -> None:
  assert certificate(EXACT, GOOD).results[0].tightest == GOOD and certificate(EXACT, GOOD).passed
  for bad in (BAD, NOTHING):
    found = certificate(GOOD, bad, EXACT)
    assert found.results[0].tightest == bad and not found.passed
  assert not certificate().passed, 'a line without a check has shown nothing'


def test_json_and_markdown_hold_every_check(tmp_path: Path) -> None:
  report.write_certificate(
    certificate(GOOD, Check('slopes', math.inf, 1e-2, 'differences', 'E9', 1)), tmp_path
  )
  found = json.loads(
    (tmp_path / 'certificate.json').read_text(), parse_constant=lambda name: pytest.fail(name)
  )
  assert found['lines'][0]['checks'][1]['worst'] == 'inf' and not found['passed']
  text = (tmp_path / 'certificate.md').read_text()
  for said in (
    'FAILED: oracle',
    '✗ slopes',
    'differences',
    'E9',
    '2.0e-7',
    'rounding',
    'a note',
    'sequence',
    'jax 1',
  ):
    assert said in text, said


def test_only_what_is_between_the_marks_is_rewritten(tmp_path: Path) -> None:
  path = tmp_path / 'README.md'
  path.write_text(
    '\n'.join(['a', '<!-- certificate -->', 'outdated', '<!-- /certificate -->', 'b'])
  )
  report.rewrite_readme(certificate(GOOD), path)
  once = path.read_text()
  assert once.startswith('a\n') and once.endswith('\nb') and 'outdated' not in once
  assert '| 1 ✓ | is its equation' in once
  report.rewrite_readme(certificate(GOOD), path)
  assert path.read_text() == once
  path.write_text('no marks')
  with pytest.raises(ValueError, match='put both'):
    report.rewrite_readme(certificate(GOOD), path)


def test_a_long_bar_is_a_wide_margin() -> None:
  assert report.bar(EXACT) == '█' * report.BAR and report.bar(BAD) == ''
  assert report.bar(Check('x', 1e-8, 1e-5, '', '', 1)) == '███'
  assert len(report.bar(Check('x', 9e-6, 1e-5, '', '', 1))) <= 1
