"""Kernel: the gradients of the experts' matrices, `a_e^T b_e` over the rows of each expert e.

A program computes one tile of one expert's matrix, in a loop over that expert's rows: no atomic
additions, so the same sums at every run.

Letters: N copies, E experts, I and J the two widths, R rows at a time, P and Q the sides of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.triton.support import call_kernel, load, program_id, store
from moejax.moe.experts.triton.tile_products import both, multiply, within, within_copies
from moejax.moe.experts.triton.tiles import TileSizes, tile_sizes


class OuterProducts(NamedTuple):
  """Sums over the rows of each expert; zeros for one without rows."""

  products: Array  # [E, I, J] `a^T b`, in the dtype of b
  sums: Array | None  # [E, J] f32, of the rows of b, where they were asked for


def outer_products(
  a: Array,
  b: Array,
  copies: Copies,
  gather_a: bool = False,
  gather_b: bool = False,
  with_sums: bool = False,
) -> OuterProducts:
  """Returns `a_e^T b_e`, and the sum of the rows of b, for each expert e.

  Args:
    a: [N, I], or [T, I] to be gathered by the copies' tokens.
    b: [N, J], or [T, J] to be gathered.
    copies: sorted by expert. Unassigned rows are not read.
    gather_a, gather_b: see a and b.
    with_sums: whether the sums are wanted, as for biases: a reduction at every turn.
  """
  num_experts, width_a, width_b = copies.load.size, a.shape[1], b.shape[1]
  sizes = tile_sizes('outer_products', a.dtype, copies, columns=width_b, depth=width_a)
  ends_E = jnp.cumsum(copies.load).astype(jnp.int32)
  kernel = functools.partial(
    outer_products_kernel, sizes=sizes, gather_a=gather_a, gather_b=gather_b
  )
  products = jax.ShapeDtypeStruct((num_experts, width_a, width_b), b.dtype)
  sums = jax.ShapeDtypeStruct((num_experts, width_b), jnp.float32)
  out_EIJ, *sums_EJ = call_kernel(
    kernel,
    name='outer_products',
    grid=(-(-width_b // sizes.columns), -(-width_a // sizes.depth), num_experts),
    out_shapes=(products, sums) if with_sums else (products,),
    arguments=(ends_E - copies.load, ends_E, copies.tokens, a, b),
    warps=sizes.warps,
    stages=sizes.stages,
  )
  return OuterProducts(out_EIJ, *(sums_EJ or (None,)))


def outer_products_kernel(
  begins: Array,
  ends: Array,
  tokens: Array,
  a: Array,
  b: Array,
  out: Array,
  *sums: Array,
  sizes: TileSizes,
  gather_a: bool,
  gather_b: bool,
) -> None:
  """Computes one tile of one expert's matrix; the arrays are references to memory.

  Args:
    begins, ends, tokens, a, b: what is read.
    out: what is stored to.
    *sums: the same, of the rows of b; nothing where they are not wanted.
    sizes: of the tile.
    gather_a, gather_b: see `outer_products`.
  """
  column, row, e = program_id(0), program_id(1), program_id(2)
  begin, end = load(begins, (e,)), load(ends, (e,))
  width_a, width_b = a.shape[1], b.shape[1]
  i_P = row * sizes.depth + jnp.arange(sizes.depth, dtype=jnp.int32)
  j_Q = column * sizes.columns + jnp.arange(sizes.columns, dtype=jnp.int32)
  is_i_P, is_j_Q = within(i_P, width_a, sizes.depth), within(j_Q, width_b, sizes.columns)

  def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
    copy_R = begin + i * sizes.rows + jnp.arange(sizes.rows, dtype=jnp.int32)
    # Rows are summed over: those of other experts must not be loaded.
    is_own_R = copy_R < end
    copy_R = within_copies(copy_R, tokens.shape[0])
    token_R = load(tokens, (copy_R,))
    a_rows_R = token_R if gather_a else copy_R
    b_rows_R = token_R if gather_b else copy_R
    a_mask = both(is_own_R, is_i_P, (sizes.rows, sizes.depth))
    b_mask = both(is_own_R, is_j_Q, (sizes.rows, sizes.columns))
    a_RP = load(a, (a_rows_R[:, None], i_P[None, :]), a_mask)
    b_RQ = load(b, (b_rows_R[:, None], j_Q[None, :]), b_mask)
    product_PQ, sum_Q = totals
    if sums:
      sum_Q += b_RQ.astype(jnp.float32).sum(0)
    return multiply(a_RP.T, b_RQ, product_PQ), sum_Q

  no_product_PQ = jnp.zeros((sizes.depth, sizes.columns), jnp.float32)
  no_sum_Q = jnp.zeros((sizes.columns,), jnp.float32)
  turns = (end - begin + sizes.rows - 1) // sizes.rows
  product_PQ, sum_Q = jax.lax.fori_loop(jnp.int32(0), turns, step, (no_product_PQ, no_sum_Q))
  is_there_PQ = (i_P < width_a)[:, None] & (j_Q < width_b)[None, :]
  store(out, (e, i_P[:, None], j_Q[None, :]), product_PQ, is_there_PQ)
  # All programs of a column have the same sums: the first one stores them.
  for sums_EJ in sums:
    store(sums_EJ, (e, j_Q), sum_Q, (j_Q < width_b) & (row == 0))
