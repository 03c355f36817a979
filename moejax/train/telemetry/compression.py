"""What general compressors make of the held-out text: the yardstick for a model's bits per byte."""

import lzma
import zlib

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
