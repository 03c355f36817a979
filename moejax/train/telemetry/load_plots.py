"""Pictures of the load of experts: a line of bars as text, and the load over time as an image.

Letters: E experts.
"""

import struct
import zlib

import numpy as np


def load_bars(load: np.ndarray) -> str:
  """The load of each expert [E] as text: blank below a tenth of the mean, half high at the mean."""
  relative = load / max(float(load.mean()), 1e-9)
  return ''.join(' ▁▂▃▄▅▆▇█'[0 if x < 0.1 else max(1, min(round(4 * x), 8))] for x in relative)


def load_image(history: np.ndarray) -> np.ndarray:
  """A layer's load over time [steps, E] as a picture [height, width, 3] u8: time goes right, experts down.

  White is the mean of its step, blue is less (darkest: nothing), red more (darkest: three times).
  """
  columns = np.stack(
    [part.mean(axis=0) for part in np.array_split(history, min(len(history), 900))]
  )
  relative = (columns / np.maximum(columns.mean(axis=1, keepdims=True), 1e-9)).T  # [E, columns]
  anchors = [0, 0.5, 0.9, 1, 1.1, 1.5, 2, 3]
  colours = np.array(
    [
      (10, 45, 125),
      (60, 130, 200),
      (205, 225, 245),
      (255, 255, 255),
      (255, 230, 205),
      (245, 150, 90),
      (215, 55, 45),
      (135, 0, 25),
    ]
  )
  cells = np.stack([np.interp(relative, anchors, channel) for channel in colours.T], -1).astype(
    np.uint8
  )
  high, wide = max(3, min(24, 512 // len(cells))), max(1, min(24, 900 // len(columns)))
  picture = cells.repeat(high, axis=0).repeat(wide, axis=1)
  if high > 4:
    picture[high - 1 :: high] = 255  # a gap below each expert
  return picture


def png(image: np.ndarray) -> bytes:
  """[height, width, 3] u8 as a PNG file."""
  height, width, _ = image.shape
  rows = np.pad(
    image.reshape(height, width * 3), ((0, 0), (1, 0))
  )  # a row begins with its filter: 0, none
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunks = {b'IHDR': head, b'IDAT': zlib.compress(rows.tobytes()), b'IEND': b''}
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks.items()
  )
