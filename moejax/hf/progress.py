"""What a person at the terminal sees while a model is read or written.

Of several processes only the first speaks.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)

from moejax.runtime.multiprocess import is_first_process


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """Shows a bar of bytes on stderr; yields what to call with the bytes that have been done."""
  columns = (
    TextColumn('{task.description}'),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(elapsed_when_finished=True),
  )
  silent = not is_first_process()
  with Progress(*columns, console=Console(stderr=True), disable=silent) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)


def say(text: str) -> None:
  """Prints on stderr, with the most memory that this process has had where the system tells."""
  status = Path('/proc/self/status')  # of Linux
  lines = status.read_text().split('\n') if status.exists() else []
  # VmHWM is the high-water mark of the resident set, in kB.
  peak = [int(line.split()[1]) / 2**20 for line in lines if line.startswith('VmHWM')]
  memory = ''.join(f', peak memory {gib:.2f} GiB' for gib in peak)
  print_note(text + memory)


def print_note(note: str) -> None:
  """Prints what a reader should know on stderr; nothing for ''."""
  if note and is_first_process():
    print(note, file=sys.stderr)
