"""Kernel: the sum of each token's copies, from rows that are sorted by expert.

Each token's rows are added in float32 and in the order of their experts: a scatter would add them
in any order, by atomic additions, and give other bits at every run.

Letters: T tokens, N copies, D model, C columns of a program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies, assigned_mask
from moejax.moe.experts.triton.support import call_kernel, load, program_id, store
from moejax.moe.experts.triton.tiles import power_of_two

MOST_COLUMNS = 2048


class CopiesByToken(NamedTuple):
  """The assigned copies of each token."""

  order: Array  # [N] i32, the copies sorted by token, then by expert; the unassigned last
  starts: Array  # [T] i32, where in the order a token's copies begin
  ends: Array  # [T] i32


def by_token(copies: Copies, num_tokens: int) -> CopiesByToken:
  """Returns which copies each of `num_tokens` tokens has: any number, from none to all."""
  is_assigned_N = assigned_mask(copies)[:, 0]
  token_N = jnp.where(is_assigned_N, copies.tokens, num_tokens)
  order_N = jnp.argsort(token_N, stable=True).astype(jnp.int32)
  counts_T = jnp.bincount(token_N, length=num_tokens + 1)[:num_tokens].astype(jnp.int32)
  ends_T = jnp.cumsum(counts_T).astype(jnp.int32)
  return CopiesByToken(order_N, ends_T - counts_T, ends_T)


def token_sums(rows_ND: Array, copies: CopiesByToken) -> Array:
  """Returns the sum of every token's rows, 0 for one without: [T, D] in the dtype of the rows."""
  num_tokens, width = copies.starts.size, rows_ND.shape[1]
  columns = min(MOST_COLUMNS, power_of_two(width))

  def kernel(order: Array, starts: Array, ends: Array, rows: Array, out: Array) -> None:
    token = program_id(0)
    column_C = program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
    is_column_C = column_C < width

    def step(i: Array, sum_C: Array) -> Array:
      copy = load(order, (i,))
      return sum_C + load(rows, (copy, column_C), is_column_C).astype(jnp.float32)

    zeros_C = jnp.zeros((columns,), jnp.float32)
    start, end = load(starts, (token,)), load(ends, (token,))
    sum_C = jax.lax.fori_loop(start, end, step, zeros_C)
    store(out, (token, column_C), sum_C, is_column_C)

  (sums_TD,) = call_kernel(
    kernel,
    name='token_sums',
    grid=(num_tokens, -(-width // columns)),
    out_shapes=(jax.ShapeDtypeStruct((num_tokens, width), rows_ND.dtype),),
    arguments=(*copies, rows_ND),
    warps=4,
    stages=2,
  )
  return sums_TD
