"""A certificate as files: JSON, Markdown, and the table of the README."""

import json
import math
from pathlib import Path

import pytest

from moejax.certify import report
from moejax.certify.checks import Check
from tests.certify.certificate_samples import GOOD, certificate


def test_json_and_markdown_hold_every_check(tmp_path: Path) -> None:
  report.write_certificate(
    certificate(GOOD, Check('slopes', math.inf, 1e-2, 'differences', 'E9', 1)), tmp_path
  )
  found = json.loads(
    (tmp_path / 'certificate.json').read_text(), parse_constant=lambda name: pytest.fail(name)
  )
  assert found['lines'][0]['checks'][1]['worst'] == 'inf' and not found['passed']
  text = (tmp_path / 'certificate.md').read_text()
  for said in ('FAILED: oracle', '✗ slopes', 'differences', 'E9', '2.0e-7'):
    assert said in text, said
  for said in ('rounding', 'a note', 'sequence', 'jax 1'):
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
