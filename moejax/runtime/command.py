"""How the commands speak: one wording of what is wrong with what they were given, a quiet end."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

CLOSED = 141  # the status that a shell gives to a program that SIGPIPE ended


def usage_error(command: str, error: object) -> str:
  """Returns what a command prints on stderr before it ends early: all problems, a line each.

  command: as Python calls it, `moejax.train`.
  """
  return '\n'.join(f'{command}: {line}' for line in f'{error}'.splitlines())


class CommandParser(argparse.ArgumentParser):
  """An argparse parser whose errors read as those of all commands."""

  def error(self, message: str) -> NoReturn:
    """Prints what is wrong, and exits with 2."""
    command = self.prog.removeprefix('python -m ').split()[0]  # without the name of a subcommand
    print(usage_error(command, f'{message}; --help lists all flags'), file=sys.stderr)
    sys.exit(2)


def open_closed_streams() -> None:
  """Makes of each standard stream that is closed one that leads nowhere.

  The next file that is opened would be given its descriptor, and hold what libraries print.
  """
  for descriptor in (0, 1, 2):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # Python's value for one that was closed
      setattr(sys, name, open(os.devnull, 'w'))


def collect_rarely() -> None:
  """Has Python look for garbage less often.

  Imports and tracing make many small objects, most of which stay: to look after every 700 of them,
  the default, takes a twentieth of a trainer's start, and more of a test's.
  """
  gc.set_threshold(50_000, 20, 50)


def run_quietly(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
  """Runs a command, and returns its exit status; Ctrl-C and a closed stdout are no tracebacks."""
  open_closed_streams()
  collect_rarely()
  try:
    status = main(argv)
    sys.stdout.flush()
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # What is still buffered would fail again at Python's exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED
  return status
