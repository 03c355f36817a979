"""A certificate as files: certificate.json, certificate.md, badge.json, the table in the README.

Certificate -> every check as JSON | tables in Markdown | a badge -> files, each written whole
"""

import json
import math
import pathlib

from moejax.certify.checks import Certificate, Check, Result, allowed, number
from moejax.runtime.files import write_whole


def check_record(check: Check) -> dict[str, object]:
  """A check as JSON can hold it: infinity, which JSON has no number for, is the text 'inf'."""
  worst = check.worst if math.isfinite(check.worst) else str(check.worst)
  return check._asdict() | {'worst': worst, 'passed': check.passed}


def result_record(result: Result) -> dict[str, object]:
  """A line of the contract with all of its checks, as JSON can hold it."""
  return {
    'number': result.number,
    'name': result.name,
    'promise': result.promise,
    'passed': result.passed,
    'seconds': round(result.seconds, 2),
    'notes': list(result.notes),
    'checks': [check_record(check) for check in result.checks],
  }


def to_json(certificate: Certificate) -> str:
  """The text of certificate.json."""
  lines = [result_record(result) for result in certificate.results]
  record = {'passed': certificate.passed, **certificate.about, 'lines': lines}
  return json.dumps(record, indent=2) + '\n'


def summary(certificate: Certificate) -> dict[str, object]:
  """The certificate in one small object, for another program: what `--json` prints."""
  failed = [result.name for result in certificate.results if not result.passed]
  return {
    'passed': certificate.passed,
    'failed': failed,
    'lines': len(certificate.results),
    'cases': sum(result.cases for result in certificate.results),
    'commit': certificate.about['commit'],
    'seed': certificate.about['seed'],
  }


def badge(certificate: Certificate) -> dict[str, object]:
  """The certificate as shields.io's endpoint badge wants it: these keys and no other."""
  found = summary(certificate)
  failed = len(found['failed'])
  verdict = f'{failed} of {found["lines"]} lines fail' if failed else f'{found["lines"]} lines hold'
  return {
    'schemaVersion': 1,
    'label': 'moejax certificate',
    'message': f'{verdict}, {found["cases"]} cases, commit {found["commit"]}, seed {found["seed"]}',
    'color': 'brightgreen' if certificate.passed else 'red',
  }


def summary_rows(certificate: Certificate) -> list[str]:
  """The rows of a Markdown table, header included: one for each line of the contract."""
  rows = [
    '| | what holds | comparisons | worst deviation | allowed |',
    '|---|---|---|---|---|',
  ]
  for result in certificate.results:
    check = result.tightest
    mark = '✓' if result.passed else '✗'
    rows.append(
      f'| {result.number} {mark} | {result.promise} | {result.cases} '
      f'| {number(check.worst)} ({check.what}) | {allowed(check.tolerance)} |'
    )
  return rows


def headline(certificate: Certificate) -> str:
  """One sentence: whether all lines hold, and the command, time, devices, commit and seed."""
  about = certificate.about
  failed = [result.name for result in certificate.results if not result.passed]
  verdict = 'FAILED: ' + ', '.join(failed) if failed else 'All lines hold'
  made = (
    f'{about["command"]}, {about["seconds"]} s, {about["devices"]}, '
    f'commit {about["commit"]}, seed {about["seed"]}'
  )
  return f'{verdict} ({made}).'


def check_row(check: Check) -> str:
  """The row of a Markdown table that says all about a check."""
  mark = '' if check.passed else '✗ '
  return (
    f'| {mark}{check.what} | {check.cases} | {number(check.worst)} | {allowed(check.tolerance)} '
    f'| {check.why} | {check.where} |'
  )


def to_markdown(certificate: Certificate) -> str:
  """The text of certificate.md: the table, then every check with the reason for its tolerance."""
  about = certificate.about
  versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
  text = [
    '# Certificate of routing and balance',
    '',
    headline(certificate),
    '',
    *summary_rows(certificate),
    '',
    'The deviation of a line is that of the check that came nearest to its tolerance.',
    '',
    '## What was covered',
    '',
  ]
  text += [f'- **{name}**: {", ".join(map(str, rows))}' for name, rows in about['covered'].items()]
  text += ['', f'Versions: {versions}.']
  for result in certificate.results:
    text += ['', f'## {result.number}. {result.name}', '']
    text += [f'{result.promise} ({result.seconds:.1f} s)', '']
    text += ['| check | cases | worst | allowed | why that much | the worst case |']
    text += ['|---|---|---|---|---|---|']
    text += [check_row(check) for check in result.checks]
    if result.notes:
      text += ['', *(f'- {note}' for note in result.notes)]
  return '\n'.join(text) + '\n'


def write_certificate(certificate: Certificate, directory: pathlib.Path) -> None:
  """Writes certificate.json, certificate.md and badge.json into a directory.

  It is made if need be.
  """
  directory.mkdir(parents=True, exist_ok=True)
  write_whole(directory / 'badge.json', json.dumps(badge(certificate)) + '\n')
  write_whole(directory / 'certificate.json', to_json(certificate))
  write_whole(directory / 'certificate.md', to_markdown(certificate))


def rewrite_readme(certificate: Certificate, path: pathlib.Path) -> None:
  """Replaces the table and the sentence under it in a README.

  Raises:
    ValueError: the file does not mark their place; see `rewrite`.
  """
  rewrite(path, 'certificate', '\n'.join([*summary_rows(certificate), '', headline(certificate)]))


def split_at_marks(path: pathlib.Path, name: str) -> tuple[str, str, str]:
  """What is before, between and after two comments, `<!-- name -->` and `<!-- /name -->`.

  Raises:
    ValueError: the file does not hold both marks, in their order.
  """
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  head, begin_or_empty, rest = path.read_text().partition(begin)
  # Only what follows the first mark is searched for the second, so that their order is checked too.
  body, end_or_empty, tail = rest.partition(end)
  if not begin_or_empty or not end_or_empty:
    raise ValueError(
      f'{path} does not hold {begin} and, after it, {end}: put both where the table belongs'
    )
  return head, body, tail


def marked_text(path: pathlib.Path, name: str) -> str:
  """The text between two comments, see `split_at_marks`."""
  return split_at_marks(path, name)[1]


def rewrite(path: pathlib.Path, name: str, body: str) -> None:
  """Puts a text between two comments that mark its place, see `split_at_marks`."""
  head, _, tail = split_at_marks(path, name)
  write_whole(path, f'{head}<!-- {name} -->\n{body}\n<!-- /{name} -->{tail}')
