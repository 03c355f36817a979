"""Where what a run measures goes: metrics.jsonl, TensorBoard, pictures of the load; and what its devices could do.

Letters: E experts.
"""
import json
import math
import os
import socket
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax import Array

from moejax.appended import Appended

from moejax.chips import peak_flops


def load_bars(load: np.ndarray) -> str:
  """The load of each expert [E] as text: blank below a tenth of the mean, half high at the mean."""
  relative = load / max(float(load.mean()), 1e-9)
  return ''.join(' ▁▂▃▄▅▆▇█'[0 if x < 0.1 else max(1, min(round(4 * x), 8))] for x in relative)


def load_image(history: np.ndarray) -> np.ndarray:
  """A layer's load over time [steps, E] as a picture [height, width, 3] u8: time goes right, experts down.

  White is the mean of its step, blue is less (darkest: nothing), red more (darkest: three times).
  """
  columns = np.stack([part.mean(axis=0) for part in np.array_split(history, min(len(history), 900))])
  relative = (columns / np.maximum(columns.mean(axis=1, keepdims=True), 1e-9)).T  # [E, columns]
  anchors = [0, 0.5, 0.9, 1, 1.1, 1.5, 2, 3]
  colours = np.array([(10, 45, 125), (60, 130, 200), (205, 225, 245), (255, 255, 255), (255, 230, 205),
                      (245, 150, 90), (215, 55, 45), (135, 0, 25)])
  cells = np.stack([np.interp(relative, anchors, channel) for channel in colours.T], -1).astype(np.uint8)
  high, wide = max(3, min(24, 512 // len(cells))), max(1, min(24, 900 // len(columns)))
  picture = cells.repeat(high, axis=0).repeat(wide, axis=1)
  if high > 4:
    picture[high - 1::high] = 255  # a gap below each expert
  return picture


def png(image: np.ndarray) -> bytes:
  """[height, width, 3] u8 as a PNG file."""
  height, width, _ = image.shape
  rows = np.pad(image.reshape(height, width * 3), ((0, 0), (1, 0)))  # a row begins with its filter: 0, none
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunks = {b'IHDR': head, b'IDAT': zlib.compress(rows.tobytes()), b'IEND': b''}
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks.items())


def mfu(tokens_per_second: float, flops_per_token: float, devices: list[jax.Device]) -> float:
  """Model FLOPs done over what the devices could do in bfloat16; 0 where that is not known, as on CPU."""
  peak = peak_flops(devices[0].device_kind)
  return tokens_per_second * flops_per_token / (peak * len(devices)) if peak else 0.0


def devices_at_work() -> list[jax.Device]:
  """Those of the mesh that is set, which may leave some idle; without one, all there are."""
  mesh = jax.sharding.get_mesh()
  return jax.devices() if mesh.empty else [*mesh.devices.flat]


class MetricsLog:
  """A file of JSON objects, one a line, each with a `step`; see `as_json`.

  Opened at the step that a run goes on from. Lines of later steps, which the run will write again, are cut
  away, and so is what is no line: the one that a killed process was writing.
  """

  def __init__(self, path: str | os.PathLike, step: int) -> None:
    self._path = Path(path)
    lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
    stay = [line for line in lines if line.endswith(b'\n') and _step(line) <= step]
    if stay != lines:
      new = self._path.with_name(f'{self._path.name}.new')
      new.write_bytes(b''.join(stay))
      new.replace(self._path)
    self._file = Appended(self._path)

  def write(self, row: Mapping[str, object]) -> None:
    """When it returns the line has left the process: no kill takes it back. On a full disk it is lost."""
    self._file.write(as_json(row).encode() + b'\n')

  def rows(self) -> list[dict[str, object]]:
    """All lines, of earlier processes too."""
    return [json.loads(line) for line in self._path.read_text(encoding='utf-8').splitlines()]

  def close(self) -> None:
    """Nothing is left to be written."""
    self._file.close()


class TensorBoard:
  """Events for TensorBoard by its own protos; its EventFileWriter would import TensorFlow where there is one.

  Opened at the step that a run goes on from: TensorBoard forgets what was written of later ones before.
  """

  def __init__(self, directory: str | os.PathLike, step: int) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'  # read in this order
    self._file = Appended(Path(directory) / name)
    self._events = [{'file_version': 'brain.Event:2'}, {'step': step + 1, 'session_log': {'status': 'START'}}]

  def scalars(self, step: int, row: Mapping[str, float]) -> None:
    """name -> value."""
    self._write(step, *({'tag': name, 'simple_value': value} for name, value in row.items()))

  def text(self, tag: str, text: str, step: int) -> None:
    """Shown as it is, and not as the Markdown that TensorBoard would take it for."""
    code = ''.join(f'    {line}\n' for line in text.split('\n'))
    self._write(step, {'tag': tag, 'metadata': {'plugin_data': {'plugin_name': 'text'}},
                       'tensor': {'dtype': 'DT_STRING', 'string_val': [code.encode()]}})

  def image(self, tag: str, image: np.ndarray, step: int) -> None:
    """[height, width, 3] u8."""
    height, width, _ = image.shape
    self._write(step, {'tag': tag, 'image': {'height': height, 'width': width, 'colorspace': 3,
                                             'encoded_image_string': png(image)}})

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


def _step(line: bytes) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf


def as_json(value: object, indent: int | None = None) -> str:
  """NaN and infinities are null: JSON has none. Arrays are lists."""
  return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: object) -> object:
  if isinstance(value, Mapping):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic, Array)):
    return _finite(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
