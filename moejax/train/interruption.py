"""A signal before the first step: there is nothing to save, and the process ends at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(RuntimeError):
  """A signal came before there was a step to save."""


@contextlib.contextmanager
def heeding_signals(received: list[int]) -> Iterator[None]:
  """In the block, raises Stopped where SIGTERM or SIGINT comes: to tokenise a text may take hours.

  Elsewhere a signal waits for the step at hand to end.

  Args:
    received: the signals that came, to which this one is added.
  """

  def stop(number: int, frame: FrameType | None) -> None:
    del frame
    received.append(number)
    raise Stopped

  before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    if received:
      raise Stopped
    yield
  except Exception as error:
    if not received:
      raise
    # A library that was at work may have made an error of its own of it.
    raise Stopped(f'signal {received[0]} before the first step; start again') from error
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
