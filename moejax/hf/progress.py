"""What a person at the terminal sees while a model is read or written."""

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


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """A bar of bytes on stderr; gives what to call with the bytes that are done."""
  columns = (
    TextColumn('{task.description}'),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(elapsed_when_finished=True),
  )
  with Progress(*columns, console=Console(stderr=True)) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)


def say(text: str) -> None:
  """For the person at the terminal; the most memory that this process has had comes behind, where the system tells."""
  status = Path('/proc/self/status')
  lines = status.read_text().split('\n') if status.exists() else []
  peak = [int(line.split()[1]) / 2**20 for line in lines if line.startswith('VmHWM')]
  print(text + ''.join(f', peak memory {gib:.2f} GiB' for gib in peak), file=sys.stderr)
