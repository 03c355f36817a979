"""The leaves of a step, read a layer at a time: a large leaf is never whole in memory.

open_leaves(directory, kinds, digests) -> leaves.read(path, layer) ... -> leaves.verify()
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoint.manifest import digest_of_sums, sums_of_part
from moejax.checkpoint.orbax_path import plain_path
from moejax.checkpoint.reader import Damaged, damaged, expect_tables
from moejax.runtime.multiprocess import fail_together, sum_over_processes

WHOLE = -1  # in the place of a layer


class StoredLeaves:
  """Leaves of one step. What each process has read is verified for all of them together."""

  def __init__(self, directory: Path, kinds: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Prepares reading; see `open_leaves`."""
    self._directory, self._kinds, self._digests = directory, dict(kinds), digests
    self._kept: dict[str, np.ndarray] = {}  # small leaves, and large ones that older versions saved
    # Of each leaf: the two sums of its digest, and how many numbers went into them, mod 2^32.
    self._sums = {path: np.zeros(3, np.uint32) for path in kinds}

  def read(self, path: str, layer: int = WHOLE, counts: bool = True) -> np.ndarray:
    """Returns a layer of a leaf, or the whole leaf, as a new array.

    Args:
      path: of the leaf.
      layer: along its first axis; WHOLE for all of them.
      counts: whether this reading goes into the digest: of all readings of a layer, in whatever
        process, just one does.

    Raises:
      Damaged: names the leaf and its file.
    """
    part = self._open_and_read(path, layer)
    if counts:
      words_before = max(0, layer) * part.size * max(1, part.itemsize // 4)
      sums = sums_of_part(part, words_before)
      self._sums[path] += np.append(sums, np.uint32(part.size % 2**32))
    return part

  def verify(self) -> None:
    """Checks all that any process has read against its digest; all processes call it.

    Raises:
      Damaged: a leaf is not as it was saved.
      RuntimeError: a part of a leaf was left out, or counted twice.
    """
    paths = sorted(self._sums)
    wrong: list[str] = []
    found = sum_over_processes(np.stack([self._sums[path] for path in paths]))
    for path, (*sums, count) in zip(paths, found):
      if not count:
        continue  # nobody wanted it
      size = math.prod(shape_and_dtype(self._kinds[path]).shape)
      if count != size % 2**32:
        raise RuntimeError(f'{path}: {count} of its {size} numbers were counted')
      if digest_of_sums(*sums) != self._digests[path]:
        wrong.append(path)
    if wrong:
      raise damaged(self._directory, wrong, ValueError('does not match its digest'))

  def _open_and_read(self, path: str, layer: int) -> np.ndarray:
    """The part of a leaf; Damaged where TensorStore cannot give it."""
    import tensorstore  # here: importing moejax.checkpoint must not take its time

    index = () if layer == WHOLE else layer
    wanted = shape_and_dtype(self._kinds[path])
    if not math.prod(wanted.shape):  # Orbax does not save empty arrays
      return np.empty(wanted.shape, wanted.dtype)[index]
    if path in self._kept:
      return self._kept[path][index]
    base = f'file://{self._directory}/'
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'ocdbt', 'base': base, 'path': f'{path}/'},
    }
    try:
      array = tensorstore.open(spec, read=True, open=True).result()
      if (array.shape, array.dtype.numpy_dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(f'found {array.dtype.name}{list(array.shape)}, not {self._kinds[path]}')
      if layer == WHOLE or array.chunk_layout.read_chunk.shape[0] == 1:
        return array[index].read().result()
      # To read a layer is to read its chunks, and they hold others, too: all are kept.
      self._kept[path] = array.read().result()
    except MemoryError:
      raise
    except Exception as error:  # TensorStore raises anything
      raise damaged(self._directory, [path], error) from error
    return self._kept[path][index]


def shape_and_dtype(kind: str) -> jax.ShapeDtypeStruct:
  """Returns what a kind of `sharding.tree.kinds` says, of float32 or bfloat16: 'float32[4, 8]'."""
  name, sizes = re.fullmatch(r'(\w+)\[(.*)\]', kind).groups()
  dtype = ml_dtypes.bfloat16 if name == 'bfloat16' else np.dtype(name)
  return jax.ShapeDtypeStruct([int(size) for size in sizes.split(', ') if size], dtype)


@contextlib.contextmanager
def open_leaves(
  directory: Path, kinds: Mapping[str, str], digests: Mapping[str, str]
) -> Iterator[StoredLeaves]:
  """Yields the leaves of a step, for as long as the block lasts.

  Args:
    directory: Orbax's, that is, the part `state` of the step.
    kinds: path -> dtype and shape of the leaves that may be read.
    digests: path -> digest that the leaf had when it was saved.

  Raises:
    Damaged: a table of the directory is missing or damaged.
  """
  with fail_together(Damaged):
    expect_tables(directory)
  with plain_path(directory) as plain:
    yield StoredLeaves(plain, kinds, digests)
