"""A watch that ends a process which hangs: the stacks of all threads, then exit status 6.

watch(seconds, file) -> beat() at each progress -> too long without one -> stacks -> os._exit
"""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

HANG = 6
TICKS = 20  # looks in the time allowed


class _Pulse:
  """Of this process: beaten since the last look, at work that compiles first, and the names of such work so far."""

  beaten, waiting, heard = False, True, frozenset()


def beat(new: str = '') -> None:
  """Progress. With a name not heard before, what begins now compiles first: it may take as long as it likes, up to the
  next beat. Before the first beat nothing is too long."""
  _Pulse.beaten, _Pulse.waiting = True, bool(new) and new not in _Pulse.heard
  _Pulse.heard |= {new}


@contextlib.contextmanager
def watch(seconds: float, file: pathlib.Path) -> Iterator[None]:
  """Ends the process if, within the block, `seconds` go by without a `beat`; 0: never. Stacks also go to the file.

  Counts its own looks, not the clock: a process that was stopped and goes on later has not hung.
  """
  over = threading.Event()

  def look() -> None:
    quiet = 0
    while not over.wait(seconds / TICKS):
      quiet = 0 if _Pulse.beaten or _Pulse.waiting else quiet + 1
      _Pulse.beaten = False
      if quiet >= TICKS:
        end(seconds, file)

  _Pulse.beaten, _Pulse.waiting, _Pulse.heard = False, True, frozenset()
  looker = threading.Thread(target=look, name='watch', daemon=True)
  if seconds:
    looker.start()
  try:
    yield
  finally:
    over.set()


def end(seconds: float, file: pathlib.Path) -> None:
  """Tells and exits. A disk or a terminal may be what hangs: the telling gets five seconds."""

  def tell() -> None:
    print(
      f'Hang: no step, no batch of a validation and no save for {seconds:g} s (hang_after). The stacks of all '
      f'threads, also in {file}. The same command goes on from the last checkpoint.',
      file=sys.__stderr__,
    )
    sys.__stderr__.flush()
    faulthandler.dump_traceback(sys.__stderr__)
    with open(file, 'w') as to:
      faulthandler.dump_traceback(to)

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  teller.join(5)
  os._exit(HANG)
