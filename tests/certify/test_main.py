"""The command `python -m moejax.certify`, as a user has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.certify import contract
from moejax.certify.__main__ import main
from tests.certify.certificate_samples import BAD, EXACT, GOOD, certificate

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_command_certifies(tmp_path: Path) -> None:
  """The real command, of three lines: the whole of it takes as long as a sixth of the suite, and CI
  runs it beside the suite."""
  readme = tmp_path / 'README.md'
  readme.write_text(
    '\n'.join(['before', '<!-- certificate -->', '<!-- /certificate -->', 'after']) + '\n'
  )
  lines = ('balance', 'causality', 'large')
  command = [sys.executable, '-m', 'moejax.certify', '--quick']
  command += [f'--only={line}' for line in lines]
  command += ['--out', str(tmp_path), '--readme', str(readme)]
  # Its own environment, as a user has it: the flags of the tests are not there to help.
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
  assert run.returncode == 0, run.stdout + run.stderr
  found = json.loads((tmp_path / 'certificate.json').read_text())
  assert found['passed'] and found['devices'] == '8 x cpu' and found['quick']
  assert [line['name'] for line in found['lines']] == list(lines)
  assert all(line['passed'] and line['checks'] for line in found['lines'])
  assert all(check['cases'] and check['why'] for line in found['lines'] for check in line['checks'])
  causality = ' '.join(found['lines'][1]['notes'])
  assert causality.count('looks ahead, first in layer 1') == 3 and 'capacity by probs' in causality
  assert 'All lines hold' in readme.read_text() and readme.read_text().startswith('before\n')
  assert len(run.stdout.splitlines()) > 30 and max(map(len, run.stdout.splitlines()[:11])) <= 80


def test_an_unknown_line_is_an_error_that_names_the_known(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS'):
    monkeypatch.setenv(name, os.environ[name])  # what the command sets is taken back
  assert main(['--only', 'oracles']) == 2
  said = capsys.readouterr().err
  assert 'oracles' in said and all(name in said for name in contract.LINES)


def test_json_is_one_object_for_a_program(
  tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS'):
    monkeypatch.setenv(name, os.environ[name])  # what the command sets is taken back
  for checks, status in (((GOOD, EXACT), 0), ((GOOD, BAD), 1)):
    monkeypatch.setattr(contract, 'certify', lambda *_, checks=checks: certificate(*checks))
    assert main(['--json', '--out', str(tmp_path)]) == status
    assert json.loads(capsys.readouterr().out) == {
      'passed': not status,
      'failed': ['oracle'] * status,
      'lines': 1,
      'cases': 8,
      'commit': 'unknown',
      'seed': 0,
    }
    badge = json.loads((tmp_path / 'badge.json').read_text())
    # shields.io refuses a badge with any other key.
    assert badge.keys() == {'schemaVersion', 'label', 'message', 'color'}
    assert badge['color'] == ('red' if status else 'brightgreen')
