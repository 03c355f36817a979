"""SIGTERM, SIGINT and SIGHUP: a run saves what it has and leaves; with nothing to save it ends at
once.

Imports no other module of moejax and nothing large: it listens while the large ones are imported.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# SIGHUP comes when the terminal or the ssh session that a run was started from is closed.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
  """The signals to stop that this process has received, and whether it has something to save."""

  def __init__(self) -> None:
    self.received: list[int] = []  # numbers, in order; it grows
    self.has_unsaved = False  # while False, a signal ends the process at once

  def end_if_due(self, number: int, earlier: int) -> None:
    """Ends the process where nothing is to be saved, or where this is not the first signal.

    Args:
      number: of the signal.
      earlier: how many have come before it.
    """
    if self.has_unsaved and not earlier:
      return
    if not earlier:
      with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f'stopped by signal {number}: there was nothing to save\n'.encode())
    os._exit(128 + number)  # the status that a shell gives to a process that a signal ended


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
  """Yields the record of signals to stop, for the loop to save and then leave.

  Python calls a handler of signals when the main thread is back in Python, and a compiler or a
  tokenizer may keep it away for minutes. So a thread of its own hears of them, too, and ends the
  process where there is nothing to save. A second signal ends it in any case.

  Where SIGHUP is ignored when the block begins, as under nohup, it stays so. To be called in the
  main thread.
  """
  stop = StopSignals()

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    stop.received.append(number)
    stop.end_if_due(number, len(stop.received) - 1)

  def listen(descriptor: int) -> None:
    earlier = 0
    with open(descriptor, 'rb', buffering=0) as numbers:
      while byte := numbers.read(1):  # b'' once the other end is closed
        if byte[0] in heard:
          stop.end_if_due(byte[0], earlier)
          earlier += 1

  is_kept_out = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  heard = [number for number in STOPPING if number != signal.SIGHUP or not is_kept_out]
  reading, writing = os.pipe()
  os.set_blocking(writing, False)  # Python asks for that: a handler must not wait
  listener = threading.Thread(target=listen, args=(reading,), name='stop_signals', daemon=True)
  listener.start()
  before_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  before = {number: signal.signal(number, handle) for number in heard}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before_descriptor)
    os.close(writing)
    listener.join()
