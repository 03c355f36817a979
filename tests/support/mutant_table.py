"""Every mutant, and the check of the quick certificate that catches it: `make mutants`.

`python -m tests.support.mutant_table [NAME ...]` runs all mutants, or these; with `--readme` it
rewrites their table in docs/certificate.md. Exit status 1: one survives, or breaks its line.

`--together` makes one program of eleven mistakes, or of these, and tells every line that fails.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moejax.certify.__main__ import prepare_environment

DOCS = Path(__file__).parents[2] / 'docs' / 'certificate.md'
# One of each kind that a certificate overlooks whose slopes are taken along the reported gradient.
ELEVEN = (
  'frozen router',
  'frozen embedding',
  'combine weights without gradient',
  'z-loss without the head',
  'router update never applied',
  'coefficients a step early',
  'same noise every step',
  'noise by row of micro-batch',
  'statistics twice under remat',
  'dropped of the last micro-batch',
  'packed keys without limit',
)


def main(argv: Sequence[str]) -> int:
  """Runs the mutants of these names, prints the table and returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m tests.support.mutant_table')
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--readme', action='store_true', help=f'rewrite the table in {DOCS.name}')
  parser.add_argument('--together', action='store_true', help='all at once, against every line')
  args = parser.parse_args(argv)
  prepare_environment()
  if args.together:
    return all_at_once(args.names or ELEVEN)
  # Only now: what is imported below imports jax, which reads the environment once.
  import pytest

  from moejax.certify import contract
  from moejax.certify.report import rewrite
  from tests.support.first_failure import first_failure
  from tests.support.mutants import MUTANTS

  rows = ['| mutant | what is wrong | line | caught by the check |', '|---|---|---|---|']
  survived = 0
  for name in args.names or MUTANTS:
    mutant, start = MUTANTS[name], time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
      mutant.apply(patch)
      caught = first_failure(mutant.line)
    missed = caught is None or caught.what == contract.UNEXPECTED
    survived += missed
    what = 'SURVIVES' if caught is None else caught.what
    rows.append(f'| {name} | {mutant.description} | {mutant.line} | {what} |')
    seconds = time.perf_counter() - start
    where = '' if caught is None else f' ({caught.worst:.1e} at {caught.where})'
    print(
      f'{"✗" if missed else "✓"} {seconds:5.1f} s  {name}: {mutant.line}, {what}{where}', flush=True
    )
  print(f'{len(rows) - 2} mutants, {survived} survive')
  if args.readme:
    rewrite(DOCS, 'mutants', '\n'.join(rows))
  return 1 if survived else 0


def all_at_once(names: Sequence[str]) -> int:
  """Tries every line on the program that has all these mistakes, and prints what each line finds.

  Returns the exit status: 1 where all lines pass.
  """
  import pytest

  from moejax.certify import contract
  from tests.support.first_failure import first_failure
  from tests.support.mutants import MUTANTS

  failed = []
  with pytest.MonkeyPatch.context() as patch:
    for name in names:
      MUTANTS[name].apply(patch)
    for line in contract.LINES:
      caught = first_failure(line)
      failed += [line] if caught else []
      found = f'fails: {caught.what} ({caught.worst:.1e} at {caught.where})' if caught else 'passes'
      print(f'{line}: {found}', flush=True)
  print(f'{len(names)} mistakes at once: {len(failed)} lines fail ({", ".join(failed)})')
  return 0 if failed else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
