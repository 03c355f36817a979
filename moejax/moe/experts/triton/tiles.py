"""How the kernels cut their work into tiles: their sizes, and the rows of each.

A tile of rows has rows of one expert alone and begins where that expert's rows begin, not on a grid
of its size. So nothing is padded, and there are at most `ceil(N / R) + E` tiles, which is known
before the load is; the tiles left over have no rows.

Letters: E experts, N copies, R rows of a tile, G tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies

LEAST = 16  # a product on tensor cores has no smaller side


class TileSizes(NamedTuple):
  """The tile that one program of a kernel computes, and how. All sides are powers of two."""

  rows: int  # copies; those summed over at a time, in the gradients of weights
  columns: int  # of the result
  depth: int  # summed over at a time; in the gradients of weights, the result's other side
  warps: int
  stages: int


# kernel -> its tile in half precision, on tensor cores, for many rows of each expert
HALF_TILES = {
  'gate_up': TileSizes(128, 64, 64, warps=8, stages=3),
  'rows_times_matrix': TileSizes(128, 128, 64, warps=8, stages=3),
  'hidden_gradient': TileSizes(128, 64, 64, warps=8, stages=3),
  'outer_products': TileSizes(64, 128, 128, warps=8, stages=3),
}
# In float32 there are no tensor cores that keep its precision: smaller tiles, that fit registers.
FLOAT32_TILES = {
  'gate_up': TileSizes(64, 32, 32, warps=4, stages=2),
  'rows_times_matrix': TileSizes(64, 64, 32, warps=4, stages=2),
  'hidden_gradient': TileSizes(64, 32, 32, warps=4, stages=2),
  'outer_products': TileSizes(32, 64, 64, warps=4, stages=2),
}


def tile_sizes(
  kernel: str, dtype: jnp.dtype, copies: Copies, *, columns: int, depth: int
) -> TileSizes:
  """Returns the tile of a kernel, no larger than what there is to compute.

  Args:
    kernel: a row of the tables.
    dtype: of the arrays that are multiplied.
    copies: with few of them for each expert, a large tile would be mostly empty.
    columns, depth: of the whole problem.
  """
  table = FLOAT32_TILES if dtype == jnp.float32 else HALF_TILES
  tile = table[kernel]
  return tile._replace(
    rows=min(tile.rows, power_of_two(-(-copies.tokens.size // copies.load.size))),
    columns=min(tile.columns, power_of_two(columns)),
    depth=min(tile.depth, power_of_two(depth)),
  )


def power_of_two(n: int) -> int:
  """Returns the least power of two that is at least n and at least LEAST."""
  return max(LEAST, 1 << (n - 1).bit_length())


class RowTiles(NamedTuple):
  """The tiles of rows: which copies each has. Without copies, `end` is `first`."""

  expert: Array  # [G] i32
  first: Array  # [G] i32, the tile's first copy
  end: Array  # [G] i32, one past the last copy of its expert


def row_tiles(load_E: Array, num_copies: int, rows: int) -> RowTiles:
  """Returns the tiles of R = `rows` copies that together have all assigned ones.

  Args:
    load_E: [E] i32, copies of each expert.
    num_copies: N, at least the sum of the load.
    rows: R.
  """
  num_experts = load_E.shape[0]
  num_tiles = -(-num_copies // rows) + num_experts
  ends_E = jnp.cumsum(load_E)
  tiles_E = -(-load_E // rows)
  tile_ends_E = jnp.cumsum(tiles_E)
  tile_G = jnp.arange(num_tiles, dtype=jnp.int32)
  # Counting the experts whose tiles have ended: searchsorted would be a loop, or E x G flags.
  expert_G = jnp.searchsorted(tile_ends_E, tile_G, side='right', method='compare_all')
  is_used_G = expert_G < num_experts
  expert_G = jnp.minimum(expert_G, num_experts - 1).astype(jnp.int32)
  number_in_expert_G = tile_G - (tile_ends_E - tiles_E)[expert_G]
  first_G = (ends_E - load_E)[expert_G] + number_in_expert_G * rows
  first_G = jnp.where(is_used_G, first_G, 0).astype(jnp.int32)
  end_G = jnp.where(is_used_G, ends_E[expert_G], 0).astype(jnp.int32)
  return RowTiles(expert_G, first_G, end_G)
