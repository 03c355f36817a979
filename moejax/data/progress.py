"""Work on a text that takes minutes says how far it is."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')
logger = logging.getLogger('moejax')

PROGRESS_SECONDS = 10.0  # between two lines


def telling_progress(
  items: Iterable[T], bytes_of: Callable[[T], int], done_so_far: str, total_bytes: int = 0
) -> Iterator[T]:
  """Yields the items, and logs now and then how much text they held, how fast, and what is left.

  Args:
    items: each is worked on by the caller before it asks for the next.
    bytes_of: UTF-8 bytes of the text of an item.
    done_so_far: what a line begins with, as 'tokenised'.
    total_bytes: of all items; 0: not known, and the time left is not told.
  """
  done, start = 0, time.perf_counter()
  told = start
  for item in items:
    yield item
    done += bytes_of(item)
    now = time.perf_counter()
    if now - told >= PROGRESS_SECONDS:
      told = now
      rate = done / (now - start)
      of_total, left = '', ''
      if total_bytes:
        minutes, seconds = divmod(round((total_bytes - done) / rate), 60)
        of_total, left = f' of {total_bytes / 1e6:.1f}', f', {minutes}m{seconds:02d}s left'
      amount = f'{done / 1e6:.1f}{of_total} MB, {rate / 1e6:.1f} MB/s{left}'
      logger.info('%s %s', done_so_far, amount)
