"""The console of a command: colours and moving lines on a terminal, plain lines everywhere else."""

import sys

from rich.console import Console

# Control characters but for line ends and tabs -> their pictures, as U+241B for escape.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in '\n\t'}
# Delete, and the second set, which has no pictures.
PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


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


def shown_as_text(text: str) -> str:
  """Returns text that a terminal shows and does not obey: what a model writes may be anything."""
  return text.translate(PICTURES)
