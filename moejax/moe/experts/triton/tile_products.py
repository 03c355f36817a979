"""What a program of the row kernels does: finds its tile, loads, multiplies and adds up.

A program computes one tile: R rows of one expert, and C columns. Rows are loaded without a mask: a
tile's foreign rows only reach rows of the result that are not stored.

Letters: E experts, R rows, C columns and K depth of a tile; K' and C' of the whole arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.triton.support import load, program_id
from moejax.moe.experts.triton.tiles import RowTiles, TileSizes


class Tile(NamedTuple):
  """Where a program is: in its kernel, R rows and C columns of the result."""

  expert: Array  # scalar i32
  rows_R: Array  # of the sorted copies
  columns_C: Array
  is_own_R: Array  # rows of this expert
  is_own_RC: Array  # and columns that there are: what may be stored
  has_rows: Array  # scalar bool

  @property
  def indices(self) -> tuple[Array, Array]:
    """Of the tile in an array over copies."""
    return self.rows_R[:, None], self.columns_C[None, :]


def own_tile(tiles: RowTiles, sizes: TileSizes, num_columns: int) -> Tile:
  """Returns the tile of this program; columns run fastest, so that its rows stay in the cache."""
  column, number = program_id(0), program_id(1)
  expert, first, end = (load(ref, (number,)) for ref in tiles)
  rows_R = first + jnp.arange(sizes.rows, dtype=jnp.int32)
  columns_C = column * sizes.columns + jnp.arange(sizes.columns, dtype=jnp.int32)
  is_own_R = rows_R < end
  is_own_RC = is_own_R[:, None] & (columns_C < num_columns)[None, :]
  return Tile(expert, rows_R, columns_C, is_own_R, is_own_RC, has_rows=first < end)


def within(indices: Array, size: int, step: int) -> Array | None:
  """Says which indices lie below the size; None if all do, since whole steps end there."""
  return indices < size if size % step else None


def both(a_I: Array | None, b_J: Array | None, shape: tuple[int, int]) -> Array | None:
  """Returns the mask [I, J] of rows and columns, of which None stands for all."""
  if a_I is None and b_J is None:
    return None
  mask = jnp.ones(shape, bool)
  if a_I is not None:
    mask &= a_I[:, None]
  return mask if b_J is None else mask & b_J[None, :]


def multiply(a: Array, b: Array, total: Array) -> Array:
  """Returns `total + a b` in float32; products of float32 are not rounded to fewer bits."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return total + jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


class Left(NamedTuple):
  """What stands on the left of a product."""

  array: Array  # [.., K'], in memory
  rows_R: Array  # the tile's rows there, all within the array


def accumulate(
  left: Left,
  stacks: tuple[Array, ...],
  tile: Tile,
  sizes: TileSizes,
  transposed: bool = False,
) -> tuple[Array, ...]:
  """Returns the rows on the left times the tile's columns of its expert's matrix, for each stack.

  Args:
    left: the rows.
    stacks: in memory, [E, K', C'], or if transposed [E, C', K'].
    tile: a tile without rows costs nothing, and gives zeros.
    sizes: of the tile.
    transposed: whether to multiply by the transposed matrices.
  """
  depth = left.array.shape[1]
  num_columns = stacks[0].shape[1 if transposed else 2]
  is_column_C = within(tile.columns_C, num_columns, sizes.columns)

  def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
    depth_K = i * sizes.depth + jnp.arange(sizes.depth, dtype=jnp.int32)
    is_depth_K = within(depth_K, depth, sizes.depth)
    left_mask = both(None, is_depth_K, (sizes.rows, sizes.depth))
    a_RK = load(left.array, (left.rows_R[:, None], depth_K[None, :]), left_mask)

    def columns_of(stack: Array) -> Array:
      if transposed:
        mask = both(is_column_C, is_depth_K, (sizes.columns, sizes.depth))
        indices = (tile.expert, tile.columns_C[:, None], depth_K[None, :])
        return load(stack, indices, mask).T
      mask = both(is_depth_K, is_column_C, (sizes.depth, sizes.columns))
      return load(stack, (tile.expert, depth_K[:, None], tile.columns_C[None, :]), mask)

    return tuple(multiply(a_RK, columns_of(w), total) for w, total in zip(stacks, totals))

  zeros_RC = jnp.zeros((sizes.rows, sizes.columns), jnp.float32)
  num_steps = jnp.int32(-(-depth // sizes.depth))
  turns = jnp.where(tile.has_rows, num_steps, jnp.int32(0))
  return jax.lax.fori_loop(jnp.int32(0), turns, step, (zeros_RC,) * len(stacks))


def within_copies(rows_R: Array, num_copies: int) -> Array:
  """Returns the rows, those past the last copy replaced by the last: they can be loaded."""
  return jnp.minimum(rows_R, num_copies - 1)


def add_bias_of(total_RC: Array, bias: Array | None, tile: Tile) -> Array:
  """Returns the tile plus its columns of the expert's bias [E, C'], if there are biases."""
  if bias is None:
    return total_RC
  mask_C = tile.columns_C < bias.shape[1]
  return total_RC + load(bias, (tile.expert, tile.columns_C), mask_C).astype(jnp.float32)
