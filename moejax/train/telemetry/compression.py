"""What general compressors make of the held-out text: the yardstick beside a model's bits per byte."""

import lzma
import zlib

# A compressor that has seen more of the training text gets no better on our sources, only slower.
TRAINING_TEXT = 32 << 20


def gzip_bits_per_byte(training: bytes, text: bytes) -> float:
  """`gzip -9` of the text after the training text: of that, deflate's window reaches back over 32 KiB."""
  compressor = (
    zlib.compressobj(9, zdict=training[-(1 << 15) :]) if training else zlib.compressobj(9)
  )
  return 8 * len(compressor.compress(text) + compressor.flush()) / len(text)


def xz_bits_per_byte(training: bytes, text: bytes) -> float:
  """`xz -9e` of training text and text together, less that of the training text alone; its window is 64 MiB."""
  training = training[-TRAINING_TEXT:]
  both, alone = (
    len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (training + text, training)
  )
  return 8 * (both - alone) / len(text)
