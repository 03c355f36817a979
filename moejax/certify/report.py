"""What a certificate says: the checks of each line, as JSON, as Markdown, and on the terminal.

  deviations of many cases -> Worst -> Check -> Result of a line -> certificate.json, certificate.md, a table

Every number is a distance between two computations, the largest over all cases, with the name of the case it is from.
"""

import dataclasses
import json
import math
import pathlib
from types import TracebackType
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.runtime.files import write_whole

BAR = 10  # cells: one for each power of ten between what was found and what is allowed


class Check(NamedTuple):
  """One comparison over many cases: how far off the worst of them is, and how far off it may be."""

  what: str  # 'gradient of global_batch'
  worst: float  # never NaN: that is infinitely far off
  tolerance: float
  why: str  # this tolerance, and of what it is a fraction
  where: str  # the case that is worst
  cases: int

  @property
  def passed(self) -> bool:
    """A check that looked at nothing has shown nothing."""
    return self.cases > 0 and self.worst <= self.tolerance

  @property
  def used(self) -> float:
    """The part of the tolerance that is used up; infinite where there is none to use."""
    if not self.passed:
      return math.inf
    return self.worst / self.tolerance if self.worst else 0.0


class Worst:
  """Looks at the deviations of a check one by one, and keeps the largest."""

  def __init__(self, what: str, tolerance: float, why: str) -> None:
    self.what, self.tolerance, self.why = what, tolerance, why
    self.worst, self.where, self.cases = 0.0, '', 0

  def see(self, where: str, deviation: float) -> None:
    """One case, by name. NaN is as far off as can be."""
    deviation = math.inf if math.isnan(deviation) else abs(float(deviation))
    if not self.cases or deviation > self.worst:
      self.worst, self.where = deviation, where
    self.cases += 1

  def check(self) -> Check:
    """What was seen so far."""
    return Check(
      self.what, self.worst, self.tolerance, self.why, self.where or 'no case', self.cases
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """One line of the contract, with all of its checks."""

  name: str
  number: int
  promise: str
  checks: tuple[Check, ...]
  seconds: float
  notes: tuple[str, ...] = ()  # what a line found out besides

  @property
  def passed(self) -> bool:
    """Every check passed, and there was one."""
    return bool(self.checks) and all(check.passed for check in self.checks)

  @property
  def cases(self) -> int:
    """How many comparisons were made."""
    return sum(check.cases for check in self.checks)

  @property
  def tightest(self) -> Check:
    """The check that came nearest to failing."""
    return max(self.checks, key=lambda check: (not check.passed, check.used, check.worst))


class Certificate(NamedTuple):
  """All lines, and what is needed to make them again."""

  results: list[Result]
  about: dict[str, object]  # versions, commit, seed, covered, ...

  @property
  def passed(self) -> bool:
    """No line failed."""
    return bool(self.results) and all(result.passed for result in self.results)


def number(x: float) -> str:
  """A deviation for a person: 0 is exact."""
  if not x:
    return '0'
  return f'{x:.1e}'.replace('e-0', 'e-').replace('e+0', 'e') if math.isfinite(x) else 'inf'


def allowed(x: float) -> str:
  """A tolerance for a person."""
  return f'{x:.0e}'.replace('e-0', 'e-') if x else 'exact'


def bar(check: Check) -> str:
  """How many powers of ten lie between what was found and what is allowed: a long bar is a wide margin."""
  if not check.passed:
    return ''
  digits = BAR if check.used == 0 else min(BAR, max(0.0, -math.log10(check.used)))
  eighths = round(8 * digits)
  return '█' * (eighths // 8) + (' ▏▎▍▌▋▊▉'[eighths % 8] if eighths % 8 else '')


def to_json(certificate: Certificate) -> str:
  """Every check of every line; what is not finite is written as text, which JSON can hold."""

  def finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)

  lines = [
    {
      'number': r.number,
      'name': r.name,
      'promise': r.promise,
      'passed': r.passed,
      'seconds': round(r.seconds, 2),
      'notes': list(r.notes),
      'checks': [
        check._asdict() | {'worst': finite(check.worst), 'passed': check.passed}
        for check in r.checks
      ],
    }
    for r in certificate.results
  ]
  return (
    json.dumps({'passed': certificate.passed, **certificate.about, 'lines': lines}, indent=2) + '\n'
  )


def summary_rows(certificate: Certificate) -> list[str]:
  """The table of a README: one row a line of the contract."""
  rows = [
    '| | what holds, over every registered row | comparisons | worst deviation | allowed |',
    '|---|---|---|---|---|',
  ]
  for r in certificate.results:
    check, mark = r.tightest, '✓' if r.passed else '✗'
    rows.append(
      f'| {r.number} {mark} | {r.promise} | {r.cases} | {number(check.worst)} ({check.what}) '
      f'| {allowed(check.tolerance)} |'
    )
  return rows


def headline(certificate: Certificate) -> str:
  """Who certifies what, in one sentence."""
  about, failed = certificate.about, [r.name for r in certificate.results if not r.passed]
  made = f'{about["command"]}, {about["seconds"]} s, {about["devices"]}, commit {about["commit"]}, seed {about["seed"]}'
  return f'{"All lines hold" if not failed else "FAILED: " + ", ".join(failed)} ({made}).'


def to_markdown(certificate: Certificate) -> str:
  """The readable certificate: the table, then every check with the reason for its tolerance."""
  about = certificate.about
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
  text += [
    '',
    'Versions: '
    + ', '.join(f'{name} {version}' for name, version in about['versions'].items())
    + '.',
  ]
  for r in certificate.results:
    text += [
      '',
      f'## {r.number}. {r.name}',
      '',
      f'{r.promise} ({r.seconds:.1f} s)',
      '',
      '| check | cases | worst | allowed | why that much | the worst case |',
      '|---|---|---|---|---|---|',
    ]
    text += [
      f'| {"" if c.passed else "✗ "}{c.what} | {c.cases} | {number(c.worst)} | {allowed(c.tolerance)} '
      f'| {c.why} | {c.where} |'
      for c in r.checks
    ]
    text += [''] * bool(r.notes) + [f'- {note}' for note in r.notes]
  return '\n'.join(text) + '\n'


def write_certificate(certificate: Certificate, directory: pathlib.Path) -> None:
  """certificate.json and certificate.md."""
  directory.mkdir(parents=True, exist_ok=True)
  write_whole(directory / 'certificate.json', to_json(certificate))
  write_whole(directory / 'certificate.md', to_markdown(certificate))


def rewrite_readme(certificate: Certificate, path: pathlib.Path) -> None:
  """Puts the table where the README has it."""
  rewrite(path, 'certificate', '\n'.join([*summary_rows(certificate), '', headline(certificate)]))


def rewrite(path: pathlib.Path, name: str, body: str) -> None:
  """Puts a text between the two comments that mark its place in a file, `<!-- name -->` and `<!-- /name -->`.

  Raises:
    ValueError: the file does not hold both marks, in their order.
  """
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  head, found, rest = path.read_text().partition(begin)
  old, closed, tail = rest.partition(end)
  if not found or not closed:
    raise ValueError(
      f'{path} does not hold {begin} and, after it, {end}: put both where the table belongs'
    )
  write_whole(path, f'{head}{begin}\n{body}\n{end}{tail}')


class Terminal:
  """A line as each check finishes, what is being looked at meanwhile, and the table at the end."""

  def __init__(self) -> None:
    self.console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
    self.status = self.console.status('')

  def __enter__(self) -> 'Terminal':
    if self.console.is_terminal:
      self.status.start()
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.status.stop()

  def line(self, name: str, promise: str) -> None:
    """A line begins."""
    self.status.update(f'[bold]{name}[/]: {promise}')

  def check(self, line: str, check: Check) -> None:
    """One check, as it finishes; 80 columns hold that."""
    mark = Text('✓', 'green') if check.passed else Text('✗', 'bold red')
    text = Text.assemble(
      mark,
      f' {line:<13} {check.what:<44} ',
      (f'{number(check.worst):>7}', 'bold'),
      (f' of {allowed(check.tolerance)}', 'dim'),
    )
    if not check.passed:
      text.append(f'\n  worst of {check.cases}: {check.where}; allowed: {check.why}', 'red')
    self.console.print(text)

  def note(self, note: str) -> None:
    """Something a line found out."""
    self.console.print(Text(f'  {note}', 'dim'))

  def table(self, certificate: Certificate, where: pathlib.Path) -> None:
    """The certificate at a glance."""
    table = Table(box=box.ROUNDED, title='routing and balance: the certificate', title_style='bold')
    for name, how in (
      ('', 'right'),
      ('line', 'left'),
      ('checks', 'right'),
      ('cases', 'right'),
      ('worst', 'right'),
      ('allowed', 'right'),
      ('margin', 'left'),
      ('time', 'right'),
    ):
      table.add_column(name, justify=how, no_wrap=True)
    for r in certificate.results:
      check, style = r.tightest, 'green' if r.passed else 'bold red'
      table.add_row(
        str(r.number),
        Text(r.name, style),
        str(len(r.checks)),
        str(r.cases),
        number(check.worst),
        allowed(check.tolerance),
        Text(bar(check) if r.passed else 'FAILED', style),
        f'{r.seconds:.0f} s',
      )
    self.console.print(table)
    self.console.print(
      'margin: one cell for each power of ten between the worst deviation and the allowed one',
      style='dim',
    )
    self.console.print(headline(certificate), style='bold' if certificate.passed else 'bold red')
    self.console.print(
      f'{where / "certificate.md"} says more, and why each tolerance is what it is'
    )
