"""One safetensors file: 8 bytes of length, a JSON header of that length, the tensors without a gap.

read_header(path) -> {name: Stored}, Stored.read(index) -> array        write_file(path, [Spec])

Read here and not by the library, which for NumPy has no F8, maps whole files, and names neither
file nor tensor when something is wrong. A header may come from anybody: it is believed only when
every number in it agrees.
"""

import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moejax.runtime.files import DAMAGED, bad_file, parse_json_object, whole_file

# dtype in a header -> NumPy's
DTYPES: dict[str, np.dtype] = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'U16': np.dtype(np.uint16),
  'I16': np.dtype(np.int16),
  'U32': np.dtype(np.uint32),
  'I32': np.dtype(np.int32),
  'U64': np.dtype(np.uint64),
  'I64': np.dtype(np.int64),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
  'C64': np.dtype(np.complex64),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}
# What --dtype may be -> a row of DTYPES.
MODEL_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16'}
HEADER_LIMIT = 100_000_000  # the library's; a longer one is there to exhaust memory
# The library refuses such a file, too: nobody can tell which of its bytes are meant.
NO_GAPS = (
  'the file is damaged, or written with tensors that share or pad their bytes, which the format '
  'forbids: write it again with save_file of safetensors, from tensors of their own'
)
CHUNK = 1 << 26  # bytes of a tensor that are copied at a time where it does not lie in order
MAX_AXES, MAX_ELEMENTS = 32, 1 << 56  # NumPy could not hold more, not even where one axis is 0
Index = tuple[slice, ...]


class Spec(NamedTuple):
  """A tensor to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: str  # a row of DTYPES
  load: Callable[[], np.ndarray]  # called once, when its turn comes; gives that shape and dtype

  @property
  def nbytes(self) -> int:
    """The bytes that it takes in a file."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file, not read yet."""

  path: Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  start: int  # where in the file its bytes begin
  stop: int  # and end

  def read(self, index: Index = ()) -> np.ndarray:
    """Returns a slice as an array of its own.

    Only its bytes are read, and no page of the file stays mapped.
    """
    spans = slice_bounds(self.shape, index)
    out = np.empty([stop - start for start, stop in spans], DTYPES[self.dtype])
    if not out.size:
      return out
    strides = [out.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(out.ndim)]
    # From the last axis that is cut, bytes lie together; the axes before it are walked.
    cut = max((axis for axis, n in enumerate(self.shape) if out.shape[axis] < n), default=0)
    walks = [range(start, stop) for start, stop in spans[:cut]]
    runs = out.reshape(math.prod(map(len, walks)), -1).view(np.uint8)
    starts = [start for start, _ in spans[cut:]]
    first = self.start + _dot(starts, strides[cut:])
    with open(self.path, 'rb', buffering=0) as file:
      for run, places in zip(runs, itertools.product(*walks)):
        self._fill(file.fileno(), memoryview(run), first + _dot(places, strides))
    return out

  def _fill(self, file: int, run: memoryview, offset: int) -> None:
    """Reads until the run is full: a call may give fewer bytes than were asked for."""
    while run:
      count = os.preadv(file, [run], offset)
      if not count:  # it was longer when the header was read
        expected = f'{len(run)} bytes of {self.name!r} at {offset}'
        raise bad_file(self.path, expected, 'the end of the file')
      run, offset = run[count:], offset + count


def _dot(places: Sequence[int], strides: Sequence[int]) -> int:
  """Bytes from the start of an array to a place along its first axes."""
  return sum(place * stride for place, stride in zip(places, strides))


def slice_bounds(shape: tuple[int, ...], index: Index) -> list[tuple[int, int]]:
  """Returns (start, stop) of every axis; those that the index does not name are whole.

  Raises:
    IndexError: a slice has a step, or there are more slices than axes.
  """
  if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
    raise IndexError(
      f'index={index} of a tensor {shape}: give at most {len(shape)} slices, without a step'
    )
  spans: list[tuple[int, int]] = []
  for axis, n in enumerate(shape):
    start, stop, _ = index[axis].indices(n) if axis < len(index) else (0, n, 1)
    spans.append((start, max(start, stop)))
  return spans


def read_header(path: Path) -> dict[str, Stored]:
  """Returns name -> tensor of all that lies in the file.

  Raises:
    ConfigError: header, shapes, offsets and the file's length do not agree.
  """
  with open(path, 'rb') as file:
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), 'little')
    limit = max(0, min(size - 8, HEADER_LIMIT))
    if length > limit:
      raise bad_file(
        path, f'a header of at most {limit} bytes in a file of {size}', f'the length {length}'
      )
    header = parse_json_object(path, file.read(length))
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
    raise bad_file(path, '__metadata__ of texts', f'{metadata!r:.200}')
  tensors = {name: _stored(path, name, fields, 8 + length) for name, fields in header.items()}
  end = 8 + length
  for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
    if tensor.start != end:  # overlapping, or a hole
      expected = f'{tensor.name!r} to begin at {end}, where those before it end'
      raise bad_file(path, expected, tensor.start, NO_GAPS)
    end = tensor.stop
  if end != size:
    remedy = DAMAGED if size < end else NO_GAPS
    raise bad_file(path, f'{end} bytes, where the last tensor ends', size, remedy)
  return tensors


def _stored(path: Path, name: str, fields: object, base: int) -> Stored:
  """A row of a header, checked; offsets in it count from `base`."""
  match fields:
    case {'dtype': str(dtype), 'shape': [*shape], 'data_offsets': [start, stop]} if all(
      type(n) is int and n >= 0 for n in (*shape, start, stop)
    ):
      pass
    case _:
      raise bad_file(path, f'dtype, shape and data_offsets of {name!r}', f'{fields!r:.200}')
  if dtype not in DTYPES:
    raise bad_file(path, f'{name!r} of a dtype in {[*DTYPES]}', repr(dtype), 'convert it to BF16')
  if len(shape) > MAX_AXES or math.prod(filter(None, shape)) >= MAX_ELEMENTS:
    raise bad_file(path, f'{name!r} of at most 32 axes and 2^56 elements', f'{shape!r:.200}')
  nbytes = math.prod(shape) * DTYPES[dtype].itemsize
  if stop - start != nbytes:
    expected = f'{nbytes} bytes for {name!r} {dtype} {shape}'
    raise bad_file(path, expected, f'data_offsets {[start, stop]}')
  return Stored(
    path=path,
    name=name,
    dtype=dtype,
    shape=tuple(shape),
    start=base + start,
    stop=base + stop,
  )


def write_file(path: Path, specs: Iterable[Spec]) -> None:
  """Writes a new file with the tensors, on the disk when it returns; holds one of them at a time.

  The widest dtype comes first, so that every tensor is aligned for those who map the file.
  """
  specs = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
  # transformers refuses a file without this format.
  header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  start = 0
  for spec in specs:
    stop = start + spec.nbytes
    header[spec.name] = {
      'dtype': spec.dtype,
      'shape': spec.shape,
      'data_offsets': [start, stop],
    }
    start = stop
  raw = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  raw += b' ' * (-len(raw) % 8)  # the format allows spaces, and the tensors begin aligned
  with whole_file(path) as file:
    file.write(len(raw).to_bytes(8, 'little') + raw)
    for spec in specs:
      _write(file, spec)


def _write(file: io.BufferedWriter, spec: Spec) -> None:
  """The bytes of a tensor; one that is announced as another must not spoil the file."""
  array = np.asarray(spec.load())
  if array.shape != tuple(spec.shape) or array.dtype != DTYPES[spec.dtype]:
    raise ValueError(
      f'{spec.name}: announced {spec.dtype} {spec.shape}, loaded {array.dtype} {array.shape}'
    )
  rows = np.atleast_1d(array)
  step = max(1, CHUNK // max(1, rows[:1].nbytes))
  count = len(rows) if rows.size else 0
  # A transposed view is copied piece by piece, not whole.
  for i in range(0, count, step):
    file.write(np.ascontiguousarray(rows[i : i + step]).reshape(-1).view(np.uint8))
