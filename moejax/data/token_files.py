"""Files of token ids, memory-mapped: flat ones, NumPy's, Megatron's, and array records.

Letters: n ids.
"""

import bisect
import itertools
import os
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from moejax.config import ConfigError, check, problem_if

NUMPY_MAGIC = b'\x93NUMPY'
MEGATRON_MAGIC = b'MMIDIDX\x00\x00'
MEGATRON_HEADER = struct.Struct('<9sQBQQ')  # magic, version, dtype, sequences, documents
# Of Megatron's codes of dtypes, those of ids.
MEGATRON_DTYPES = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}


class Ids(Protocol):
  """A sequence of ids that is read where it is looked at."""

  def __len__(self) -> int: ...

  def __getitem__(self, part: slice) -> np.ndarray: ...


class Joined:
  """Several sequences of ids as one."""

  def __init__(self, parts: Sequence[Ids]) -> None:
    """Joins the parts in order; nothing of them is read."""
    self._parts = parts
    self._ends = list(itertools.accumulate(len(part) for part in parts))

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, part: slice) -> np.ndarray:
    """Returns the ids from part.start to part.stop; there is no step."""
    start, stop, _ = part.indices(len(self))
    pieces = [np.zeros(0, np.uint16)]
    index = bisect.bisect_right(self._ends, start)
    while start < stop:
      before = self._ends[index] - len(self._parts[index])
      piece = self._parts[index][start - before : stop - before]
      pieces.append(np.asarray(piece))
      start += len(piece)
      index += 1
    return np.concatenate(pieces[1:] or pieces)


class IdRange:
  """The ids of a sequence from one place to another."""

  def __init__(self, ids: Ids, start: int, stop: int) -> None:
    """Takes ids[start:stop]; nothing of them is read."""
    self._ids, self._start, self._stop = ids, start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, part: slice) -> np.ndarray:
    """Returns the ids from part.start to part.stop, counted from the start of this part."""
    start, stop, _ = part.indices(len(self))
    return self._ids[self._start + start : self._start + stop]


class Records:
  """The ids of array records after each other; each record is ids of one dtype and nothing else."""

  def __init__(self, path: str, dtype: np.dtype) -> None:
    """Opens the file, and reads it once for the lengths of its records."""
    import grain.sources

    self._source = grain.sources.ArrayRecordDataSource([path])
    self._dtype = dtype
    sizes = [len(self._source[i]) for i in range(len(self._source))]
    odd = [i for i, size in enumerate(sizes) if size % dtype.itemsize]
    check(problem_if(odd, f'{path}: record {odd[:1]} is not whole ids of data.token_dtype={dtype}'))
    self._ends = list(itertools.accumulate(size // dtype.itemsize for size in sizes))

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, part: slice) -> np.ndarray:
    """Returns the ids from part.start to part.stop."""
    start, stop, _ = part.indices(len(self))
    first = bisect.bisect_right(self._ends, start)
    last = min(bisect.bisect_left(self._ends, stop), len(self._ends) - 1)
    before = self._ends[first - 1] if first else 0
    records = [np.frombuffer(self._source[i], self._dtype) for i in range(first, last + 1)]
    return np.concatenate([np.zeros(0, self._dtype), *records])[start - before : stop - before]


def open_binary(path: str, dtype: np.dtype) -> Ids:
  """Opens a flat file, or Megatron's where its index lies beside it."""
  index = f'{path.removesuffix(".bin")}.idx'
  return open_megatron(path, index) if os.path.exists(index) else open_flat(path, dtype)


def open_flat(path: str, dtype: np.dtype) -> np.ndarray:
  """Opens a file of ids of one dtype and nothing else, as of nanoGPT and OLMo.   [n] of it"""
  size = os.path.getsize(path)
  check(
    problem_if(
      size == 0 or size % dtype.itemsize,
      f'{path} has {size} bytes, which are no ids of data.token_dtype={dtype}; give another',
    )
  )
  return np.memmap(path, dtype, 'r')


def open_numpy(path: str, dtype: np.dtype) -> np.ndarray:
  """Opens what np.save wrote; without NumPy's header, as OLMo has it, the file is flat.   [n]"""
  with open(path, 'rb') as file:
    is_numpy = file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
  if not is_numpy:
    return open_flat(path, dtype)
  ids = np.load(path, mmap_mode='r', allow_pickle=False)
  is_ids = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
  check(problem_if(not is_ids, f'{path} holds {ids.dtype}{list(ids.shape)}, not [n] integers'))
  return ids


def open_megatron(path: str, index: str) -> np.ndarray:
  """Opens a file of Megatron's preprocessing, of the dtype that its index says.   [n] of it"""
  with open(index, 'rb') as file:
    header = file.read(MEGATRON_HEADER.size)
    if len(header) < MEGATRON_HEADER.size or not header.startswith(MEGATRON_MAGIC):
      raise ConfigError(f'{index} is no index of Megatron (MMIDIDX); make it again, or remove it')
    _, version, code, sequences, _ = MEGATRON_HEADER.unpack(header)
    if version != 1 or code not in MEGATRON_DTYPES:
      raise ConfigError(f'{index}: version {version}, dtype {code} is not read; make it again')
    lengths = np.fromfile(file, np.int32, sequences)
  dtype = np.dtype(MEGATRON_DTYPES[code])
  expected, size = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, os.path.getsize(path)
  check(problem_if(size != expected, f'{path}: {index} tells of {expected} bytes, found {size}'))
  return open_flat(path, dtype)


TOKEN_FORMATS: dict[str, Callable[[str, np.dtype], Ids]] = {
  '.bin': open_binary,
  '.npy': open_numpy,
  '.array_record': Records,
  '.arrayrecord': Records,
}
