"""Files of tensors for tests: written by us, read by the library, and put together by hand."""

import json
import math
from pathlib import Path

import numpy as np
import safetensors

from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import DTYPES, Spec

STORED = {dtype: name for name, dtype in DTYPES.items()}
Arrays = dict[str, np.ndarray]


def specs(arrays: Arrays) -> list[Spec]:
  return [Spec(name, a.shape, STORED[a.dtype], lambda a=a: a) for name, a in arrays.items()]


def write(directory: Path, arrays: Arrays, max_shard_bytes: int = 10**9, **files: str) -> Path:
  write_tensors(directory, specs(arrays), files, max_shard_bytes)
  return directory


def noise(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
  """Any bytes that are a number: NaN has no place in comparisons."""
  size = math.prod(shape) * DTYPES[dtype].itemsize
  array = np.random.default_rng(seed).integers(0, 2 if dtype == 'BOOL' else 120, size, np.uint8)
  return array.view(DTYPES[dtype]).reshape(shape)


def by_library(path: Path) -> dict[str, bytes]:
  """Name -> bytes, as the library reads the file."""
  return {name: bytes(found['data']) for name, found in safetensors.deserialize(path.read_bytes())}


def raw(path: Path, header: object, data: bytes = b'', length: int | None = None) -> None:
  """A file put together by hand, right or wrong; `length` is what it says of its header."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)


def entry(start: int, stop: int, *shape: int, dtype: str = 'U8') -> dict[str, object]:
  """What a header says of a tensor."""
  return {'dtype': dtype, 'shape': shape, 'data_offsets': (start, stop)}
