"""The arrays of a model, streamed out of published files onto a mesh, a layer of a leaf at a time.

A stack of layers is never whole in NumPy: zeros lie on the mesh, and each layer is put in its place
there.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import check, problem_if
from moejax.families.schema.tensor_names import FROM_FILE, Tensor
from moejax.hf.safetensors.directory import Tensors
from moejax.hf.safetensors.file import DTYPES, Index, slice_bounds

# Numbers: a leaf of fewer is made at once, which is quicker than a program for its layers.
SMALL = 1 << 24
# dtype -> unsigned integers of its size, and the bits of its exponent
EXPONENT_BITS: dict[np.dtype, tuple[type, int]] = {
  DTYPES['F32']: (np.uint32, 0x7F800000),
  DTYPES['BF16']: (np.uint16, 0x7F80),
  DTYPES['F16']: (np.uint16, 0x7C00),
}
Spans = tuple[tuple[int, int], ...]  # start and stop along each axis


def _both_columns(index: Index) -> Index:
  """The columns of a fused tensor from which every second one is taken."""
  columns = index[-1]
  return (*index[:-1], slice(2 * columns.start, 2 * columns.stop))


# how -> where in the file lies what our tensor has at an index; see FROM_FILE
IN_FILE: dict[str, Callable[[Index], Index]] = {
  'same': lambda index: index,
  'transposed': lambda index: (*index[:-2], index[-1], index[-2]),
  'even': _both_columns,
  'odd': _both_columns,
}


class TensorPiece(NamedTuple):
  """A leaf, or one layer of it, to be made in NumPy and put on the mesh."""

  parts: tuple[Tensor, ...]  # what it is made of
  outer: int  # how many first axes of the leaf are left out: those that count its layers
  shape: tuple[int, ...]
  dtype: np.dtype


class LeafReader:
  """Reads leaves of a model from the tensors of published files."""

  def __init__(self, stored: Tensors, on_read: Callable[[int], object]) -> None:
    """`on_read` is told the bytes of each piece that is done."""
    self._stored, self._on_read = stored, on_read

  def read(
    self,
    parts: tuple[Tensor, ...],
    shape: tuple[int, ...],
    home: NamedSharding,
    dtype: np.dtype = DTYPES['F32'],
  ) -> Array:
    """Returns a leaf on its sharding.

    Args:
      parts: the tensors that it is made of, layer by layer; () for zeros.
      shape: of the leaf.
      home: where it lies.
      dtype: of the leaf.
    """
    if math.prod(shape) <= SMALL or not parts or not parts[0].index:
      leaf = self._on_mesh(TensorPiece(parts, 0, shape, dtype), home)
      self._on_read(self._nbytes(parts))
      return leaf
    leaf = jnp.zeros(shape, dtype, device=home)
    layer_home = NamedSharding(home.mesh, PartitionSpec(*home.spec[1:]))
    kinds = {self._stored.dtype(part.name) for part in parts}
    # In the dtype of the files a layer takes half the memory and the traffic, where that is enough;
    # where the leaf lies it gets its own.
    in_files = DTYPES[kinds.pop() if len(kinds) == 1 else 'F32']
    for layer, group in itertools.groupby(parts, lambda part: part.index[0]):
      piece = TensorPiece(tuple(group), 1, shape[1:], in_files)
      leaf = _put_layer(leaf, self._on_mesh(piece, layer_home), layer, home)
      jax.block_until_ready(leaf)  # or several layers would wait in NumPy
      self._on_read(self._nbytes(piece.parts))
    return leaf

  def _on_mesh(self, piece: TensorPiece, home: NamedSharding) -> Array:
    """The piece, of which each device's part is read by itself, and equal ones once."""
    made: dict[Spans, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
      spans = tuple(slice_bounds(piece.shape, index))
      if spans not in made:
        made[spans] = assemble(self._stored, piece, spans)
      return made[spans]

    return jax.make_array_from_callback(piece.shape, home, part)

  def _nbytes(self, parts: Iterable[Tensor]) -> int:
    """Bytes of the tensors in the files; half of one that two leaves share."""
    total = 0
    for part in parts:
      sharers = 2 if part.how in ('even', 'odd') else 1
      total += math.prod(part.shape) * DTYPES[self._stored.dtype(part.name)].itemsize // sharers
    return total


def assemble(stored: Tensors, piece: TensorPiece, spans: Spans) -> np.ndarray:
  """Returns what lies within `spans` of a piece, zero where no tensor reaches."""
  out = np.zeros([stop - start for start, stop in spans], piece.dtype)

  def fill(tensor: Tensor) -> None:
    # The first axes of a piece count tensors, such as experts; this one has one place along them.
    place = tensor.index[piece.outer :]
    inner = tuple(i - start for i, (start, _) in zip(place, spans))
    if all(0 <= i < n for i, n in zip(inner, out.shape)):
      within = tuple(itertools.starmap(slice, spans[len(place) :]))
      in_file = stored.read(tensor.name, IN_FILE[tensor.how](within))
      _expect_finite(stored, tensor.name, in_file)
      out[inner] = FROM_FILE[tensor.how](in_file)

  with ThreadPoolExecutor() as pool:  # reading and casting let go of Python's lock
    list(pool.map(fill, piece.parts))
  return out


def _expect_finite(stored: Tensors, name: str, numbers: np.ndarray) -> None:
  """Raises ConfigError where a part of a tensor is NaN or infinite: no logit would be a number."""
  bits, exponent = EXPONENT_BITS[numbers.dtype]
  # All ones: NaN or inf. Testing bits takes a sixth of the time of NumPy's isfinite of bfloat16.
  wrong = np.count_nonzero((numbers.view(bits) & exponent) == exponent)
  check(
    problem_if(
      wrong,
      f'{stored.path(name)}: {name!r} has {wrong} numbers that are NaN or infinite among the '
      f'{numbers.size} read: no token could be drawn from this model; take a checkpoint from '
      'before it diverged, or the file again if its publisher has other numbers',
    )
  )


@functools.partial(jax.jit, static_argnames='home', donate_argnums=0)
def _put_layer(leaf: Array, new: Array, layer: int, home: NamedSharding) -> Array:
  """The leaf with one layer replaced, in place: the old one's memory is donated."""
  updated = jax.lax.dynamic_update_index_in_dim(leaf, new.astype(leaf.dtype), layer, 0)
  return jax.lax.with_sharding_constraint(updated, home)
