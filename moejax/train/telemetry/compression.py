"""What general compressors make of the held-out text: the yardstick for a model's bits per byte."""

import functools
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moejax.data.holdout import digest_of
from moejax.data.pipeline import Data
from moejax.data.token_cache import open_cached

FORMAT = 1  # raise it when a compressor makes something else of the same text
# A compressor that has seen more of the training text gets no better on our sources, only slower.
TRAINING_TEXT = 32 << 20
GZIP_WINDOW = 1 << 15


def gzip_bits_per_byte(training: bytes, text: bytes) -> float:
  """Bits per byte of `gzip -9` of the text after the training text.

  Of that, deflate's window reaches back over 32 KiB.
  """
  if training:
    compressor = zlib.compressobj(9, zdict=training[-GZIP_WINDOW:])
  else:
    compressor = zlib.compressobj(9)
  return 8 * len(compressor.compress(text) + compressor.flush()) / len(text)


def xz_bits_per_byte(training: bytes, text: bytes) -> float:
  """Bits per byte that the text adds to `xz -9e` of the training text; its window is 64 MiB."""
  # xz takes no dictionary: both are compressed, and the training text alone is taken off.
  training = training[-TRAINING_TEXT:]
  both, alone = xz_size(training + text), xz_size(training)
  return 8 * (both - alone) / len(text)


def xz_size(data: bytes) -> int:
  """Bytes of `xz -9e` of the data."""
  return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


# gzip first: it is told while xz, the slower one, is still at work.
COMPRESSORS: dict[str, Callable[[bytes, bytes], float]] = {
  'gzip': gzip_bits_per_byte,
  'xz': xz_bits_per_byte,
}


def compress_held_out(data: Data, cache: Path) -> Iterator[tuple[str, float]]:
  """Yields compressor -> bits per byte of the held-out text after the training text.

  Both are read whole for it: that is done once for a text, and what came of it kept in the cache.

  Args:
    data: which text.
    cache: the folder of the cache.
  """
  text = [data.fingerprint[name] for name in ('source_digest', 'held_out', 'tokenizer_digest')]
  sides = functools.cache(lambda: (data.train_text(), data.validation_text()))

  def build(bits_per_byte: Callable[[bytes, bytes], float]) -> list[bytes]:
    return [repr(bits_per_byte(*sides())).encode()]

  for name, bits_per_byte in COMPRESSORS.items():
    path = cache / f'compressed-{digest_of(FORMAT, name, text)}'
    yield name, float(bytes(open_cached(path, functools.partial(build, bits_per_byte))))
