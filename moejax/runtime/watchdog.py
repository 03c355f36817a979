"""A watchdog that ends a process which hangs: the stacks of all threads, then exit status 6.

watch(seconds, file) -> beat() at each progress -> too long without one -> stacks -> os._exit
"""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

HANG = 6  # the exit status
CHECKS = 20  # of the heartbeat, in the time allowed
REPORT_SECONDS = 5  # for the report, before the process ends without it


class _Heartbeat:
  """Heartbeat state of this process: `beat` writes it, and the thread of `watch` checks it."""

  beaten = False  # since the last check
  compiling = True  # a phase has begun that was not seen before: nothing is too long
  seen_phases: frozenset[str] = frozenset()


def beat(phase: str = '') -> None:
  """Reports progress.

  Before the first beat nothing is too long: the process starts and compiles.

  Args:
    phase: name of what begins now. The first time that a name is given, what begins is compiled
      first, and it may take as long as it needs until the next beat. '': nothing compiles.
  """
  _Heartbeat.beaten = True
  _Heartbeat.compiling = bool(phase) and phase not in _Heartbeat.seen_phases
  _Heartbeat.seen_phases |= {phase}


@contextlib.contextmanager
def watch(seconds: float, file: pathlib.Path) -> Iterator[None]:
  """Ends the process if, within the block, `seconds` go by without a `beat`.

  It counts its own checks and does not read the clock: a process that was stopped (SIGSTOP, a
  suspended machine) and goes on later has not hung.

  Args:
    seconds: the time allowed between two beats; 0: forever.
    file: where the stacks of all threads are written, besides the terminal.
  """
  over = threading.Event()

  def check_until_over() -> None:
    quiet_checks = 0
    while not over.wait(seconds / CHECKS):
      is_alive = _Heartbeat.beaten or _Heartbeat.compiling
      quiet_checks = 0 if is_alive else quiet_checks + 1
      _Heartbeat.beaten = False
      if quiet_checks >= CHECKS:
        end_hung_process(seconds, file)

  # A block before this one, as a test has, may have left its state.
  _Heartbeat.beaten, _Heartbeat.compiling, _Heartbeat.seen_phases = False, True, frozenset()
  checker = threading.Thread(target=check_until_over, name='watch', daemon=True)
  if seconds:
    checker.start()
  try:
    yield
  finally:
    over.set()


def end_hung_process(seconds: float, file: pathlib.Path) -> None:
  """Reports the hang with the stacks of all threads, and exits with HANG.

  A disk or a terminal may be what hangs: the report is written by a thread that is not waited for
  longer than REPORT_SECONDS.
  """

  def report() -> None:
    # sys.__stderr__ and not sys.stderr, which a progress bar or a test may have replaced.
    print(
      f'Hang: no step, no batch of a validation and no save for {seconds:g} s (hang_after). The '
      f'stacks of all threads, also in {file}. The same command goes on from the last checkpoint.',
      file=sys.__stderr__,
    )
    sys.__stderr__.flush()
    faulthandler.dump_traceback(sys.__stderr__)
    with open(file, 'w') as stacks:
      faulthandler.dump_traceback(stacks)

  reporter = threading.Thread(target=report, daemon=True)
  reporter.start()
  reporter.join(REPORT_SECONDS)
  os._exit(HANG)  # sys.exit would end this thread only, and wait for the one that hangs
