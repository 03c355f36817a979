"""What a process sets up around a run: where compiled programs are kept, where the log goes, what signals mean."""

import contextlib
import logging
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType

import jax

from moejax.runtime.multiprocess import is_first_process


def keep_compiled_programs() -> None:
  """JAX's persistent cache, also for what compiles fast: a warm start then costs a second. A user's own wins."""
  if not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'moejax' / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def configure_logging() -> Iterator[None]:
  """What moejax's own modules log, tokenising or a damaged checkpoint, is for the person at the terminal; of other
  processes than the first, errors only."""
  logger, handler = logging.getLogger('moejax'), logging.StreamHandler()
  before = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
  logger.propagate = False
  # Tasks of Orbax that also failed, where one save did: SaveFailed has said it. Some are told at exit only.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  hook = sys.unraisablehook

  def tell(unraisable: object) -> None:
    if (
      f'{unraisable.exc_value}' != 'Event loop is closed'
    ):  # of TensorStore's threads, after Orbax has gone on
      hook(unraisable)

  sys.unraisablehook = tell
  try:
    yield
  finally:
    sys.unraisablehook = hook
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """SIGTERM and SIGINT are written down, for the loop to save and leave; a second one leaves at once."""
  received: list[int] = []

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    if received:
      os._exit(128 + number)
    received.append(number)

  before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def end_at_once() -> None:
  """To be called with an error that nobody foresaw. Alone it does nothing; of several processes it ends this one here:
  a Python that exits would first wait for the others, while they wait for it."""
  if jax.process_count() > 1:
    traceback.print_exc()
    print(
      'This process ends, and with it all others; another one may have been the first. The same command, given to '
      'all again, goes on from the last checkpoint.',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)
