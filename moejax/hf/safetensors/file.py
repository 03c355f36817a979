"""One safetensors file: 8 bytes of length, a JSON header of that length, then the tensors' bytes without a gap.

read_header(path) -> {name: Stored}, Stored.read(index) -> array        write_file(path, [Spec])
Read here and not by the library, which for NumPy has no F8, maps whole files, and names neither file nor tensor
when something is wrong. A header may come from anybody: it is believed only when every number in it agrees.
"""

import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moejax.runtime.files import bad_file, parse_json_object, whole_file

DTYPES: dict[str, np.dtype] = {
  name: np.dtype(kind)
  for name, kind in {
    'BOOL': np.bool_,
    'U8': np.uint8,
    'I8': np.int8,
    'U16': np.uint16,
    'I16': np.int16,
    'U32': np.uint32,
    'I32': np.int32,
    'U64': np.uint64,
    'I64': np.int64,
    'F16': np.float16,
    'BF16': ml_dtypes.bfloat16,
    'F32': np.float32,
    'F64': np.float64,
    'C64': np.complex64,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu,
  }.items()
}
HEADER_LIMIT = 100_000_000  # the library's; a longer one is there to exhaust memory
CHUNK = 1 << 26  # bytes of a tensor that are copied at a time where it does not lie in order
Index = tuple[slice, ...]


class Spec(NamedTuple):
  """A tensor to be written; `load` is called once, when its turn comes, and gives that shape and dtype."""

  name: str
  shape: tuple[int, ...]
  dtype: str  # a row of DTYPES
  load: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file, not read yet."""

  path: Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  start: int  # where in the file its bytes begin
  stop: int

  def read(self, index: Index = ()) -> np.ndarray:
    """The slice, an array of its own: only its bytes are read, and no page of the file stays mapped."""
    spans = slice_bounds(self.shape, index)
    out = np.empty([stop - start for start, stop in spans], DTYPES[self.dtype])
    if not out.size:
      return out
    strides = [out.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(out.ndim)]
    # From the last axis that is cut, bytes lie together; the axes before it are walked.
    cut = max((axis for axis, n in enumerate(self.shape) if out.shape[axis] < n), default=0)
    walks = [range(start, stop) for start, stop in spans[:cut]]
    runs = out.reshape(math.prod(map(len, walks)), -1).view(np.uint8)
    first = self.start + sum(
      start * stride for (start, _), stride in zip(spans[cut:], strides[cut:])
    )
    with open(self.path, 'rb', buffering=0) as file:
      for run, at in zip(runs, itertools.product(*walks)):
        self._fill(
          file.fileno(), memoryview(run), first + sum(i * stride for i, stride in zip(at, strides))
        )
    return out

  def _fill(self, file: int, run: memoryview, at: int) -> None:
    while run:
      count = os.preadv(file, [run], at)
      if not count:  # it was longer when the header was read
        raise bad_file(
          self.path, f'{len(run)} bytes of {self.name!r} at {at}', 'the end of the file'
        )
      run, at = run[count:], at + count


def slice_bounds(shape: tuple[int, ...], index: Index) -> list[tuple[int, int]]:
  """(start, stop) of every axis; those that the index does not name are whole. IndexError for a step."""
  if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
    raise IndexError(
      f'index={index} of a tensor {shape}: give at most {len(shape)} slices, without a step'
    )
  spans = [s.indices(n)[:2] for s, n in itertools.zip_longest(index, shape, fillvalue=slice(None))]
  return [(start, max(start, stop)) for start, stop in spans]


def read_header(path: Path) -> dict[str, Stored]:
  """What lies in the file; ConfigError where header, shapes, offsets and the file's length do not agree."""
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
  at = 8 + length
  for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
    if tensor.start != at:  # overlapping, or a hole
      raise bad_file(
        path, f'{tensor.name!r} to begin at {at}, where those before it end', tensor.start
      )
    at = tensor.stop
  if at != size:
    raise bad_file(path, f'{at} bytes, where the last tensor ends', size)
  return tensors


def _stored(path: Path, name: str, fields: object, base: int) -> Stored:
  match fields:
    case {'dtype': str(dtype), 'shape': [*shape], 'data_offsets': [start, stop]} if all(
      type(n) is int and n >= 0 for n in (*shape, start, stop)
    ):
      pass
    case _:
      raise bad_file(path, f'dtype, shape and data_offsets of {name!r}', f'{fields!r:.200}')
  if dtype not in DTYPES:
    raise bad_file(path, f'{name!r} of a dtype in {[*DTYPES]}', repr(dtype), 'convert it to BF16')
  # NumPy could not hold these, not even where one axis is 0
  if len(shape) > 32 or math.prod(filter(None, shape)) >= 1 << 56:
    raise bad_file(path, f'{name!r} of at most 32 axes and 2^56 elements', f'{shape!r:.200}')
  nbytes = math.prod(shape) * DTYPES[dtype].itemsize
  if stop - start != nbytes:
    raise bad_file(
      path, f'{nbytes} bytes for {name!r} {dtype} {shape}', f'data_offsets {[start, stop]}'
    )
  return Stored(path, name, dtype, tuple(shape), base + start, base + stop)


def write_file(path: Path, specs: Iterable[Spec]) -> None:
  """A new file with the tensors, on the disk when it returns; holds one of them at a time.

  The widest dtype comes first, so that every tensor is aligned for those who map the file.
  """
  specs = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
  header: dict[str, object] = {
    '__metadata__': {'format': 'pt'}
  }  # transformers refuses a file without it
  at = 0
  for spec in specs:
    header[spec.name] = {
      'dtype': spec.dtype,
      'shape': spec.shape,
      'data_offsets': [at, at := at + spec.nbytes],
    }
  raw = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  raw += b' ' * (-len(raw) % 8)
  with whole_file(path) as file:
    file.write(len(raw).to_bytes(8, 'little') + raw)
    for spec in specs:
      _write(file, spec)


def _write(file: io.BufferedWriter, spec: Spec) -> None:
  array = np.asarray(spec.load())
  if array.shape != tuple(spec.shape) or array.dtype != DTYPES[spec.dtype]:
    raise ValueError(
      f'{spec.name}: announced {spec.dtype} {spec.shape}, loaded {array.dtype} {array.shape}'
    )
  rows = np.atleast_1d(array)
  step = max(1, CHUNK // max(1, rows[:1].nbytes))
  for i in range(
    0, len(rows) if rows.size else 0, step
  ):  # a transposed view is copied piece by piece, not whole
    file.write(np.ascontiguousarray(rows[i : i + step]).reshape(-1).view(np.uint8))
