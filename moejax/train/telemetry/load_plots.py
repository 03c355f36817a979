"""Pictures of the load of experts: a line of bars as text, and the load over time as an image.

Letters: E experts.
"""

import struct
import zlib

import numpy as np

MOST_COLUMNS = 900
# Load relative to the mean -> colour [3]; between two of them it is interpolated.
COLOURS = {
  0: (10, 45, 125),
  0.5: (60, 130, 200),
  0.9: (205, 225, 245),
  1: (255, 255, 255),
  1.1: (255, 230, 205),
  1.5: (245, 150, 90),
  2: (215, 55, 45),
  3: (135, 0, 25),
}


def load_bars(load: np.ndarray) -> str:
  """The load of each expert [E] as text: blank below a tenth of the mean, half high at the mean."""
  bars = ''
  for relative in load / max(float(load.mean()), 1e-9):
    height = 0 if relative < 0.1 else max(1, min(round(4 * relative), 8))
    bars += ' ▁▂▃▄▅▆▇█'[height]
  return bars


def load_image(history: np.ndarray) -> np.ndarray:
  """A layer's load over time [steps, E] as a picture [height, width, 3] u8.

  Time goes right, experts down. White is the mean of its step, blue is less (darkest: nothing), red
  more (darkest: three times).
  """
  # Of a long run a column is the mean over neighbouring steps.
  spans = np.array_split(history, min(len(history), MOST_COLUMNS))
  columns = np.stack([span.mean(axis=0) for span in spans])
  relative = (columns / np.maximum(columns.mean(axis=1, keepdims=True), 1e-9)).T  # [E, columns]
  anchors, colours = [*COLOURS], np.array([*COLOURS.values()])
  channels = [np.interp(relative, anchors, channel) for channel in colours.T]
  cells = np.stack(channels, -1).astype(np.uint8)
  # A cell is as large as it can be in about 512 x 900 pixels, within limits.
  high = max(3, min(24, 512 // len(cells)))
  wide = max(1, min(24, MOST_COLUMNS // len(columns)))
  picture = cells.repeat(high, axis=0).repeat(wide, axis=1)
  if high > 4:
    picture[high - 1 :: high] = 255  # a gap below each expert
  return picture


def png(image: np.ndarray) -> bytes:
  """[height, width, 3] u8 as a PNG file."""
  height, width, _ = image.shape
  # A row begins with the number of its filter: 0, none.
  rows = np.pad(image.reshape(height, width * 3), ((0, 0), (1, 0)))
  # 8 bits a channel, colour type 2: RGB; then the only compression and filter method, no interlace.
  head = struct.pack('>II', width, height) + bytes([8, 2, 0, 0, 0])
  chunks = {b'IHDR': head, b'IDAT': zlib.compress(rows.tobytes()), b'IEND': b''}
  file = b'\x89PNG\r\n\x1a\n'
  for kind, data in chunks.items():
    checksum = struct.pack('>I', zlib.crc32(kind + data))
    file += struct.pack('>I', len(data)) + kind + data + checksum
  return file
