"""What a run survives: `make faults` runs the tests of it and prints what came of each fault.

As a plugin of pytest it notes the exit statuses of the trainers that a test starts.
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.table
from rich.console import Console

from tests.support.fault_rows import ROWS, Row

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / 'docs' / 'faults.md'  # where the table is printed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
  """Notes the exit status of every trainer that the test starts."""
  started: list[subprocess.Popen] = []
  plain = subprocess.Popen.__init__

  def note(self: subprocess.Popen, args: object, *rest: object, **more: object) -> None:
    if 'train.py' in str(args):
      started.append(self)
    plain(self, args, *rest, **more)

  subprocess.Popen.__init__ = note
  try:
    return (yield)
  finally:
    subprocess.Popen.__init__ = plain
    statuses = [process.returncode for process in started]  # None: it goes on
    ended = [status for status in statuses if status is not None]
    item.user_properties.append(('statuses', ended))


class Outcomes:
  """What became of each test, its parameters together."""

  def __init__(self) -> None:
    self.outcomes: dict[str, set[str]] = defaultdict(set)
    self.statuses: dict[str, set[int]] = defaultdict(set)

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    """Called by pytest: of a test that fails before it begins there is no `call`."""
    name = report.nodeid.split('[')[0]
    if report.when == 'call' or report.outcome != 'passed':
      self.outcomes[name].add(report.outcome)
      for key, statuses in report.user_properties:
        if key == 'statuses':
          self.statuses[name].update(statuses)

  def cell(self, row: Row) -> str:
    """A cell of the table: the worst outcome, and how trainers ended."""
    found, statuses = set(), set()
    for name in row.nodes():
      found |= self.outcomes[name] or {'not run'}
      statuses |= self.statuses[name]
    outcome = next(word for word in ('not run', 'failed', 'skipped', 'passed') if word in found)
    if not statuses:
      return outcome
    return f'{outcome}; exit {", ".join(map(str, sorted(statuses, key=abs)))}'


def markdown_rows(rows: list[Row], outcomes: Outcomes) -> str:
  """The table in Markdown."""
  cells = [('fault', 'what a run makes of it', 'tests'), ('---',) * 3]
  cells += [(row.fault, row.behaviour, outcomes.cell(row)) for row in rows]
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def main() -> None:
  """Prints the table; exits with 1 where a test did not pass."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--only', default='', metavar='WORD', help='faults with a word that begins so'
  )
  parser.add_argument('--workers', default='0', help='tests at once')
  parser.add_argument(
    '--readme',
    default='',
    nargs='?',
    const=str(DOCUMENT),
    metavar='FILE',
    help='rewrite the table between its two comments in a file, docs/faults.md if none is named',
  )
  args = parser.parse_args()
  chosen = [row for row in ROWS if re.search(rf'\b{args.only}', row.fault)]
  tests = [f'{ROOT}/{name}' for row in chosen for name in row.nodes()]
  # A file to a worker: its tests share a run, and their names stay as they are in the table.
  options = ['-q', '-p', 'tests.support.fault_table', '-n', args.workers, '--dist=loadfile']
  outcomes = Outcomes()
  status = pytest.main([*options, f'--rootdir={ROOT}', *tests], plugins=[outcomes])
  table = rich.table.Table('fault', 'what a run makes of it', 'tests', show_lines=True)
  for row in chosen:
    table.add_row(row.fault, row.behaviour, outcomes.cell(row))
  Console(width=None if sys.stdout.isatty() else 160).print(table)
  if args.readme:
    # Imported here: as a plugin this file is loaded before conftest.py has set up JAX.
    from moejax.certify.report import rewrite

    rewrite(Path(args.readme), 'faults', markdown_rows(chosen, outcomes))
  raise SystemExit(int(status))


if __name__ == '__main__':
  main()
