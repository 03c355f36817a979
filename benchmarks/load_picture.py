"""A picture of the load of every expert over time, of one run or several beside each other.

  python -m benchmarks.load_picture "no balance=runs/a" "sign bias=runs/b" --out=FILE.svg

Each run is LABEL=DIRECTORY, and its load.jsonl is read. A row is an expert, time goes right, a
panel is a layer. White is an even share, red is more, blue is less.
"""

import argparse
import base64
import html
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.train.telemetry.load_plots import load_image, png

# Pixels: the width of a panel, the height of an expert, between panels, above and beside them.
WIDTH, ROW, GAP, TOP, LEFT = 420, 11, 12, 24, 60


class Panel(NamedTuple):
  """The load of one layer."""

  title: str
  history: np.ndarray  # [steps, E]

  @property
  def height(self) -> int:
    """Pixels."""
    return ROW * self.history.shape[1]


class Run(NamedTuple):
  """What is drawn of a run: a column of panels."""

  label: str
  steps: list[int]
  panels: list[Panel]


def read_run(argument: str) -> Run:
  """The run that LABEL=DIRECTORY names.

  Raises:
    ValueError: the argument is no LABEL=DIRECTORY, or there is no step in its load.jsonl.
  """
  label, equals, directory = argument.partition('=')
  file = Path(directory) / 'load.jsonl'
  if not equals or not file.is_file():
    raise ValueError(f'{argument}: give LABEL=DIRECTORY of a run, which holds load.jsonl')
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  if not rows:
    raise ValueError(f'{file} has no step yet: train longer')
  loads = np.array([row['load'] for row in rows])  # [steps, L, E]
  panels = [Panel(f'layer {layer + 1}', loads[:, layer]) for layer in range(loads.shape[1])]
  return Run(label, [row['step'] for row in rows], panels)


def draw_panel(panel: Panel, x: int, y: int) -> str:
  """The SVG of a panel whose upper left corner is at (x, y)."""
  # A PNG inside the SVG: a rectangle for each expert and step would be a hundred times as large.
  image = base64.b64encode(png(load_image(panel.history))).decode()
  middle = y + panel.height // 2 + 4
  title = f'<text x="{x - 6}" y="{middle}" text-anchor="end">{panel.title}</text>'
  box = f'x="{x}" y="{y}" width="{WIDTH}" height="{panel.height}"'
  picture = f'<image {box} preserveAspectRatio="none" href="data:image/png;base64,{image}"/>'
  frame = f'<rect {box} fill="none" stroke="#888" stroke-width="0.5"/>'
  return f'{title}\n{picture}\n{frame}'


def draw_run(run: Run, x: int) -> tuple[str, int]:
  """The SVG of a column of panels at x, and the y of its lower end."""
  label, middle = html.escape(run.label), x + WIDTH // 2
  parts = [f'<text x="{middle}" y="16" text-anchor="middle" font-weight="bold">{label}</text>']
  y = TOP
  for panel in run.panels:
    parts.append(draw_panel(panel, x, y))
    y += panel.height + GAP
  parts.append(f'<text x="{x}" y="{y + 4}">step {run.steps[0]}</text>')
  parts.append(f'<text x="{x + WIDTH}" y="{y + 4}" text-anchor="end">step {run.steps[-1]}</text>')
  return '\n'.join(parts), y + GAP


def draw(runs: list[Run]) -> str:
  """The whole SVG."""
  pitch = WIDTH + LEFT + 10
  columns, bottoms = [], []
  for i, run in enumerate(runs):
    column, bottom = draw_run(run, LEFT + i * pitch)
    columns.append(column)
    bottoms.append(bottom)
  width, height = len(runs) * pitch, max(bottoms)
  head = (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
  )
  background = f'<rect width="{width}" height="{height}" fill="white"/>'
  return '\n'.join([head, background, *columns, '</svg>']) + '\n'


def main() -> int:
  """Writes the picture. Returns the exit status: 0, or 2 for a run that cannot be read."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('runs', nargs='+', metavar='LABEL=DIRECTORY', help='runs to draw')
  parser.add_argument('--out', required=True, help='the SVG file to write')
  args = parser.parse_args()
  try:
    picture = draw([read_run(argument) for argument in args.runs])
  except ValueError as error:
    print(f'benchmarks.load_picture: {error}', file=sys.stderr)
    return 2
  Path(args.out).parent.mkdir(parents=True, exist_ok=True)
  Path(args.out).write_text(picture)
  return 0


if __name__ == '__main__':
  sys.exit(main())
