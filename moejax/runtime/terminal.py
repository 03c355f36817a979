"""The console of a command: colours and moving lines on a terminal, plain lines everywhere else."""

import sys

from rich.console import Console


def plain_console() -> Console:
  """Returns a console for stdout that never folds a line and finds no colours in numbers.

  Only stdout itself says whether it is a terminal. Rich would also believe FORCE_COLOR, which
  notebooks and CI services set, and draw a moving line into a file hundreds of times.
  """
  is_terminal = sys.stdout is not None and sys.stdout.isatty()
  return Console(
    highlight=False,
    soft_wrap=True,
    force_jupyter=False,
    force_terminal=None if is_terminal else False,
  )
