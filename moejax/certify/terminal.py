"""A certificate on the terminal: each check as it finishes, and the table at the end."""

import math
import pathlib
from types import TracebackType

from rich import box
from rich.table import Table
from rich.text import Text

from moejax.certify.checks import Certificate, Check, Result, allowed, number
from moejax.certify.report import headline
from moejax.runtime.terminal import plain_console

BAR = 10  # cells at most: one for each power of ten between the deviation and the tolerance
# Heading and alignment of each column of the table.
COLUMNS = (
  ('', 'right'),
  ('line', 'left'),
  ('checks', 'right'),
  ('cases', 'right'),
  ('worst', 'right'),
  ('allowed', 'right'),
  ('margin', 'left'),
  ('time', 'right'),
)


def bar(check: Check) -> str:
  """A bar of the margin: a full cell for each power of ten from deviation to tolerance."""
  if not check.passed:
    return ''
  # An exact match is infinitely many powers of ten away, and has the longest bar.
  digits = BAR if check.used == 0 else min(BAR, max(0.0, -math.log10(check.used)))
  full, eighths = divmod(round(8 * digits), 8)
  return '█' * full + (' ▏▎▍▌▋▊▉'[eighths] if eighths else '')


class Terminal:
  """A listener of a certificate that prints; a context, in which a status line says what runs."""

  def __init__(self) -> None:
    self.console = plain_console()
    self.status = self.console.status('')

  def __enter__(self) -> 'Terminal':
    if self.console.is_terminal:  # a file would be filled with a spinner
      self.status.start()
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.status.stop()

  def line(self, name: str, promise: str) -> None:
    """Shows which line of the contract is running."""
    self.status.update(f'[bold]{name}[/]: {promise}')

  def check(self, line: str, check: Check) -> None:
    """Prints one check in 80 columns; of one that failed, also its worst case."""
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
    """Prints what a line found out besides its checks."""
    self.console.print(Text(f'  {note}', 'dim'))

  def table(self, certificate: Certificate) -> None:
    """Prints the certificate at a glance."""
    table = Table(box=box.ROUNDED, title='routing and balance: the certificate', title_style='bold')
    for heading, alignment in COLUMNS:
      table.add_column(heading, justify=alignment, no_wrap=True)
    for result in certificate.results:
      table.add_row(*table_cells(result))
    self.console.print(table)
    self.console.print(
      'margin: one cell for each power of ten between the worst deviation and the allowed one',
      style='dim',
    )
    self.console.print(headline(certificate), style='bold' if certificate.passed else 'bold red')

  def written(self, directory: pathlib.Path) -> None:
    """Prints where the files that say more were written."""
    self.console.print(
      f'{directory / "certificate.md"} says more, and why each tolerance is what it is'
    )


def table_cells(result: Result) -> list[str | Text]:
  """What the table says of a line, a cell for each of COLUMNS."""
  check = result.tightest
  style = 'green' if result.passed else 'bold red'
  return [
    str(result.number),
    Text(result.name, style),
    str(len(result.checks)),
    str(result.cases),
    number(check.worst),
    allowed(check.tolerance),
    Text(bar(check) if result.passed else 'FAILED', style),
    f'{result.seconds:.0f} s',
  ]
