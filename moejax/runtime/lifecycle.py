"""What a process sets up around a run: the cache of compiled programs, and the log."""

import contextlib
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator

import jax

from moejax.runtime.multiprocess import is_first_process


def keep_compiled_programs() -> None:
  """Turns JAX's persistent compilation cache on, also for programs that compile fast.

  A warm start then costs a second. Where the user has set a cache, nothing is changed.
  """
  if not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'moejax' / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def configure_logging() -> Iterator[None]:
  """In the block, sends what moejax's own modules log, such as a damaged checkpoint, to stderr.

  Of other processes than the first, errors only. What other libraries log is left as it is, but for
  errors of background tasks that have been reported otherwise.
  """
  logger, handler = logging.getLogger('moejax'), logging.StreamHandler()
  before = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
  logger.propagate = False
  # Where a save fails, further tasks of Orbax fail with it, some at exit only: SaveFailed is all.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  hook = sys.unraisablehook

  def pass_on(unraisable: object) -> None:
    # Threads of TensorStore raise this one after Orbax has gone on.
    if f'{unraisable.exc_value}' != 'Event loop is closed':
      hook(unraisable)

  sys.unraisablehook = pass_on
  try:
    yield
  finally:
    sys.unraisablehook = hook
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


def end_at_once() -> None:
  """Ends this process where it is one of several; alone, it does nothing.

  To be called while an unforeseen error is handled. Python's own exit would first wait for the
  other processes, while they wait for this one.
  """
  if jax.process_count() > 1:
    traceback.print_exc()
    print(
      'This process ends, and with it all others; another one may have been the first. The same '
      'command, given to all again, goes on from the last checkpoint.',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)
