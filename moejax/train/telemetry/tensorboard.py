"""Event files for TensorBoard, written by its own protos."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moejax.runtime.append_log import AppendLog
from moejax.train.telemetry.load_plots import png


class TensorBoard:
  """Events for TensorBoard by its own protos; its EventFileWriter would import TensorFlow where there is one.

  Opened at the step that a run goes on from: TensorBoard forgets what was written of later ones before.
  """

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'  # read in this order
    self._file = AppendLog(Path(directory) / name)
    self._events = [
      {'file_version': 'brain.Event:2'},
      {'step': step + 1, 'session_log': {'status': 'START'}},
    ]

  def scalars(self, step: int, row: Mapping[str, float]) -> None:
    """name -> value."""
    self._write(step, *({'tag': name, 'simple_value': value} for name, value in row.items()))

  def text(self, tag: str, text: str, step: int) -> None:
    """Shown as it is, and not as the Markdown that TensorBoard would take it for."""
    code = ''.join(f'    {line}\n' for line in text.split('\n'))
    self._write(
      step,
      {
        'tag': tag,
        'metadata': {'plugin_data': {'plugin_name': 'text'}},
        'tensor': {'dtype': 'DT_STRING', 'string_val': [code.encode()]},
      },
    )

  def image(self, tag: str, image: np.ndarray, step: int) -> None:
    """[height, width, 3] u8."""
    height, width, _ = image.shape
    self._write(
      step,
      {
        'tag': tag,
        'image': {
          'height': height,
          'width': width,
          'colorspace': 3,
          'encoded_image_string': png(image),
        },
      },
    )

  def close(self) -> None:
    """Everything written is in the file before, too."""
    self._file.close()

  def _write(self, step: int, *values: Mapping[str, object]) -> None:
    # Here, since the imports take a quarter of a second: by now the devices are at work on the next step.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    records = b''
    for event in [*self._events, {'step': step, 'summary': {'value': values}}]:
      data = Event(wall_time=time.time(), **event).SerializeToString()
      size = struct.pack('<Q', len(data))
      sums = [struct.pack('<I', masked_crc32c(part)) for part in (size, data)]
      records += size + sums[0] + data + sums[1]
    if self._file.write(records):
      self._events = []
