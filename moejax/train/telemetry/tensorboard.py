"""Event files for TensorBoard, written with its own protos."""

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
  """Events for TensorBoard, by its own protos.

  Its EventFileWriter would import TensorFlow where there is one. Opened at the step that a run goes
  on from: TensorBoard forgets what was written of later ones before.
  """

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a directory in the order of their names: the time comes first.
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._file = AppendLog(Path(directory) / name)
    # The head of the file, kept until there was room for it. START is what makes TensorBoard forget
    # later steps.
    self._head = [
      {'file_version': 'brain.Event:2'},
      {'step': step + 1, 'session_log': {'status': 'START'}},
    ]

  def scalars(self, step: int, row: Mapping[str, float]) -> None:
    """Writes values by their names."""
    self._write(step, *({'tag': name, 'simple_value': value} for name, value in row.items()))

  def text(self, tag: str, text: str, step: int) -> None:
    """Writes a text that is not empty, shown as it is, and not as the Markdown that TensorBoard
    would take it for."""
    if not text:
      return
    # Indented by four, a line is code.
    code = ''.join(f'    {line}\n' for line in text.split('\n'))
    value = {
      'tag': tag,
      'metadata': {'plugin_data': {'plugin_name': 'text'}},
      'tensor': {'dtype': 'DT_STRING', 'string_val': [code.encode()]},
    }
    self._write(step, value)

  def image(self, tag: str, image: np.ndarray, step: int) -> None:
    """Writes a picture, [height, width, 3] u8."""
    height, width, _ = image.shape
    picture = {
      'height': height,
      'width': width,
      'colorspace': 3,  # RGB
      'encoded_image_string': png(image),
    }
    self._write(step, {'tag': tag, 'image': picture})

  def close(self) -> None:
    """Closes the file; every event is in it already."""
    self._file.close()

  def _write(self, step: int, *values: Mapping[str, object]) -> None:
    # Here, since the imports take a quarter of a second: by now the devices are at work on the next
    # step.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    records = b''
    for event in [*self._head, {'step': step, 'summary': {'value': values}}]:
      data = Event(wall_time=time.time(), **event).SerializeToString()
      # A TFRecord: the size, its checksum, the data, its checksum.
      size = struct.pack('<Q', len(data))
      size_sum = struct.pack('<I', masked_crc32c(size))
      data_sum = struct.pack('<I', masked_crc32c(data))
      records += size + size_sum + data + data_sum
    # In one piece, so that a file never ends within a record.
    if self._file.write(records):
      self._head = []
