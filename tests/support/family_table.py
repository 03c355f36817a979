"""moejax against the goldens of public implementations: `make families` prints the table.

tests/golden/NAME -> our model -> logits, weights, gradients, AdamW steps, text -> worst deviation
"""

import argparse
import sys
from pathlib import Path

import rich.table
from jax.sharding import Mesh
from rich.console import Console

from moejax.certify.report import rewrite
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.family_deviations import of_forward, of_steps, of_text
from tests.support.family_golden import NAMES, Golden, load
from tests.support.family_mistakes import of_mistakes

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'families.md'  # where the table is printed

# what is measured -> how much of it is allowed
COLUMNS = {
  'logits': 1e-4,
  'weights': 1e-5,
  'loss': 1e-5,
  'gradient': 1e-4,
  'losses': 1e-4,
  'steps': 1e-4,
  'text': 0.0,
  'mesh logits': 1e-4,
  'mesh loss': 1e-5,
  'mesh gradient': 1e-4,
}


def mesh_for(golden: Golden) -> Mesh:
  """Of eight devices; a dense model's one expert is not split."""
  return make_mesh(
    MeshConfig(data=2, fsdp=2, expert=2) if golden.routes else MeshConfig(data=4, fsdp=2)
  )


def of_mesh(golden: Golden) -> dict[str, float]:
  """The columns that are measured on eight devices."""
  return {f'mesh {name}': value for name, value in of_forward(golden, mesh_for(golden)).items()}


def measure(golden: Golden) -> dict[str, float]:
  """All columns of a family's row."""
  found = of_forward(golden) | of_steps(golden) | of_text(golden) | of_mesh(golden)
  return {column: found[column] for column in COLUMNS if column in found}


TITLES = {
  'logits': 'logits',
  'weights': 'combine weights',
  'gradient': 'gradients',
  'steps': 'six AdamW steps',
  'text': 'other tokens',
  'mesh logits': 'logits, 8 devices',
  'mesh gradient': 'gradients, 8 devices',
}


def written(value: float | None, column: str) -> str:
  """A cell of the table."""
  if value is None:
    return '-'
  return f'{value:.0f}' if column == 'text' else f'{value:.1e}'.replace('e-0', 'e-')


def markdown_rows(rows: dict[str, dict[str, str]]) -> str:
  """The table in Markdown, without what only a developer looks at."""
  cells = [['family', *TITLES.values()], ['---'] * (1 + len(TITLES))]
  cells += [[name, *(row[column] for column in TITLES)] for name, row in rows.items()]
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def main() -> None:
  """Prints the table; exits with 1 where something is not within its bounds."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', nargs='*', default=NAMES, choices=NAMES, help='some families')
  parser.add_argument(
    '--readme',
    default='',
    nargs='?',
    const=str(DOCUMENT),
    metavar='FILE',
    help='rewrite the table between its two comments in a file, docs/families.md if none is named',
  )
  args, rows, failed = parser.parse_args(), {}, False
  table = rich.table.Table('family', *COLUMNS, 'smallest mistake')
  for name in args.only:
    print(name, file=sys.stderr)
    golden = load(name)
    found, mistakes = measure(golden), of_mistakes(golden)
    failed |= not all(value <= COLUMNS[column] for column, value in found.items())
    rows[name] = {}
    for column in COLUMNS:
      rows[name][column] = written(found[column] if column in found else None, column)
    least = min(mistakes, key=mistakes.__getitem__)
    table.add_row(name, *rows[name].values(), f'{mistakes[least]:.1e} {least}')
  bounds = {column: written(value, column) for column, value in COLUMNS.items()}
  table.add_row('allowed', *bounds.values(), '')
  Console(width=200).print(table)
  if args.readme:
    rewrite(Path(args.readme), 'families', markdown_rows(rows | {'allowed': bounds}))
  raise SystemExit(failed)


if __name__ == '__main__':
  main()
