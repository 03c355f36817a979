"""Every mutant, and the check of the quick certificate that catches it: `make mutants`.

`python -m tests.support.mutant_table [NAME ...]` runs all mutants, or these; with `--readme` it
rewrites their table in docs/certificate.md. Exit status 1: one survives, or breaks its line.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moejax.certify.__main__ import prepare_environment

DOCS = Path(__file__).parents[2] / 'docs' / 'certificate.md'


def main(argv: Sequence[str]) -> int:
  """Runs the mutants of these names, prints the table and returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m tests.support.mutant_table')
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--readme', action='store_true', help=f'rewrite the table in {DOCS.name}')
  args = parser.parse_args(argv)
  prepare_environment()
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


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
