"""The dropless expert FFN: y[t] = sum over the copies of t of weight * down(silu(gate x_t) * up x_t), fused.

  gather the rows of a block -> gate, up -> silu(gate) * up -> down -> weigh -> add to the block's tokens

One signature, one implementation a platform:
- CPU, and GPU until it has a kernel of its own: a loop over experts around a loop over that expert's blocks of rows,
  of dynamic length, so that nothing is padded and nothing is computed for an expert that nobody chose.
  `jax.lax.ragged_dot` is a dense product over all experts there: E times the work.
- TPU: `jax.lax.ragged_dot`, a real grouped-matmul kernel.

The gradient is written by hand: it keeps the two pre-activations, and sums an expert's weight gradients in the carry of
the inner loop, so that each is written once.

Letters: T tokens, D model, F FFN hidden, E experts, N = T * K copies, R rows in a block.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from moejax.layers import swiglu
from moejax.sharding import platform


class Copies(NamedTuple):
  """The copies of tokens sorted by expert; those of nobody (dropped, padding, another shard's) come last."""

  tokens: Array   # [N] i32  the token that each is a copy of
  weights: Array  # [N] f32  what its output is multiplied by
  load: Array     # [E] i32  copies of each expert; what is past their sum belongs to nobody


class Weights(NamedTuple):
  """The experts' projections, all in the compute dtype."""

  gate: Array  # [E, D, F]
  up: Array    # [E, D, F]
  down: Array  # [E, F, D]


Residuals = tuple[Array, Copies, Weights, Array, Array]   # x, copies, weights, gate x [N, F], up x [N, F]
Forward = Callable[[Array, Copies, Weights], tuple[Array, Array, Array]]
Backward = Callable[[Residuals, Array], tuple[Array, Array, Weights]]


@jax.custom_vjp
def grouped_ffn(x: Array, copies: Copies, weights: Weights) -> Array:
  """The weighted sum of its experts' outputs for every token.

  Args:
    x: [T, D] in the compute dtype.
    copies: sorted by expert, see `moe.dispatch.sort_copies`.

  Returns:
    [T, D] in the dtype of x. Sums over a token's copies and over blocks are in that dtype.
  """
  return forward(x, copies, weights)[0]


def forward(x: Array, copies: Copies, weights: Weights) -> tuple[Array, Array, Array]:
  """(y [T, D], gate x [N, F], up x [N, F]), for the platform at hand."""
  return IMPLEMENTATIONS[BEST[platform()]][0](x, copies, weights)


def grouped_ffn_fwd(x: Array, copies: Copies, weights: Weights) -> tuple[Array, Residuals]:
  """Forward for differentiation: keeps the pre-activations."""
  y, gate, up = forward(x, copies, weights)
  return y, (x, copies, weights, gate, up)


def grouped_ffn_bwd(residuals: Residuals, dy: Array) -> tuple[Array, Copies, Weights]:
  """Cotangents of x, of the copies' weights (their integers have none) and of the experts' projections."""
  dx, d_copy_weights, d_weights = IMPLEMENTATIONS[BEST[platform()]][1](residuals, dy)
  return dx, Copies(None, d_copy_weights, None), d_weights


grouped_ffn.defvjp(grouped_ffn_fwd, grouped_ffn_bwd)


# ---- blocked: the nested loop ----


def rows_per_block(num_copies: int, num_experts: int) -> int:
  """128 from 256 rows an expert on, 64 below: measured by benchmarks/moe_layer.py; larger ones waste the last block."""
  return min(num_copies, 128 if num_copies // num_experts >= 256 else 64)


def zeros(like: Array, *shape: int) -> Array:
  """Zeros of the dtype of `like`, varying over the same mesh axes, as a loop's carry inside `shard_map` must."""
  return jax.lax.full_like(like, 0, shape=shape)


def for_blocks(copies: Copies, rows: int, expert: Array, body: Callable, carry: tuple) -> tuple:
  """`body(at, mine, carry) -> carry` for each block of an expert; `mine` [R, 1] marks the rows that are this expert's.

  A block that would reach past the last copy begins earlier; then its first rows are not `mine`.
  """
  ends = jnp.cumsum(copies.load)
  begin, end = ends[expert] - copies.load[expert], ends[expert]
  last = copies.tokens.shape[0] - rows

  def block(i: Array, carry: tuple) -> tuple:
    want = begin + i * rows
    at = jnp.minimum(want, last)
    row = at + jnp.arange(rows, dtype=at.dtype)
    return body(at, ((row >= want) & (row < end))[:, None], carry)

  return jax.lax.fori_loop(0, (end - begin + rows - 1) // rows, block, carry)


def blocked_forward(x: Array, copies: Copies, weights: Weights) -> tuple[Array, Array, Array]:
  """See the top of the file. -> y [T, D], gate x [N, F], up x [N, F]."""
  num_copies, (num_experts, _, d_ff) = copies.tokens.shape[0], weights.gate.shape
  rows = rows_per_block(num_copies, num_experts)

  def expert(e: Array, carry: tuple) -> tuple:
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(at: Array, mine: Array, carry: tuple) -> tuple:
      y, gates, ups = carry
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=rows)
      tokens = take(copies.tokens)
      x_block = x[tokens]
      gate, up = x_block @ w.gate, x_block @ w.up                        # [R, F]
      out = jnp.where(mine, take(copies.weights)[:, None].astype(x.dtype), 0) * (swiglu(gate, up) @ w.down)
      gates = put(gates, jnp.where(mine, gate, take(gates)), at)
      ups = put(ups, jnp.where(mine, up, take(ups)), at)
      return y.at[tokens].add(out), gates, ups

    return for_blocks(copies, rows, e, body, carry)

  empty = zeros(x, num_copies, d_ff)
  return jax.lax.fori_loop(0, num_experts, expert, (zeros(x, *x.shape), empty, empty))


def blocked_backward(residuals: Residuals, dy: Array) -> tuple[Array, Array, Weights]:
  """-> dx [T, D], gradient of the copies' weights [N] f32, gradients of the projections."""
  x, copies, weights, gates, ups = residuals
  num_copies, num_experts = copies.tokens.shape[0], weights.gate.shape[0]
  rows = rows_per_block(num_copies, num_experts)

  def expert(e: Array, carry: tuple) -> tuple:
    dx, d_copies, d_weights = carry
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(at: Array, mine: Array, carry: tuple) -> tuple:
      dx, d_copies, dw = carry
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=rows)
      tokens = take(copies.tokens)
      x_block, dy_block = x[tokens], dy[tokens]
      copy_weights = jnp.where(mine, take(copies.weights)[:, None].astype(x.dtype), 0)
      hidden, pull = jax.vjp(swiglu, take(gates), take(ups))             # [R, F]
      d_hidden = dy_block @ w.down.T                                     # of the output before its weight
      d_copy = (d_hidden * hidden).sum(-1).astype(jnp.float32)
      d_gate, d_up = pull(d_hidden * copy_weights)
      dw = Weights(dw.gate + outer(x_block, d_gate), dw.up + outer(x_block, d_up),
                   dw.down + outer(hidden * copy_weights, dy_block))
      d_copies = put(d_copies, jnp.where(mine[:, 0], d_copy, take(d_copies)), at)
      return dx.at[tokens].add(d_gate @ w.gate.T + d_up @ w.up.T), d_copies, dw

    start = jax.tree.map(lambda one: zeros(one.astype(jnp.float32), *one.shape), w)
    dx, d_copies, dw = for_blocks(copies, rows, e, body, (dx, d_copies, start))
    return dx, d_copies, jax.tree.map(lambda stacked, one: stacked.at[e].set(one.astype(x.dtype)), d_weights, dw)

  carry = (zeros(x, *x.shape), zeros(copies.weights, num_copies), jax.tree.map(lambda a: zeros(a, *a.shape), weights))
  return jax.lax.fori_loop(0, num_experts, expert, carry)


def outer(a: Array, b: Array) -> Array:
  """`a^T b` in float32: blocks of an expert add up, and bfloat16 would lose the small ones."""
  return jnp.einsum('ri,rj->ij', a, b, preferred_element_type=jnp.float32)


def put(buffer: Array, block: Array, at: Array) -> Array:
  """`buffer` with `block` written at row `at`."""
  return jax.lax.dynamic_update_slice_in_dim(buffer, block, at, axis=0)


# ---- ragged: one grouped-matmul kernel a product ----

# dW_e = lhs_e^T rhs_e: the ragged dimension is the contracted one.
RAGGED_OUTER = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def owned(copies: Copies) -> Array:
  """[N, 1] bool: copies that belong to some expert; what a kernel leaves in the rows of nobody is undefined."""
  return (jnp.arange(copies.tokens.shape[0]) < copies.load.sum())[:, None]


def ragged_forward(x: Array, copies: Copies, weights: Weights) -> tuple[Array, Array, Array]:
  """`blocked_forward` by `ragged_dot`."""
  rows, mine = x[copies.tokens], owned(copies)
  gate, up = (jnp.where(mine, jax.lax.ragged_dot(rows, w, copies.load), 0) for w in (weights.gate, weights.up))
  out = jnp.where(mine, jax.lax.ragged_dot(swiglu(gate, up), weights.down, copies.load), 0)
  return jnp.zeros_like(x).at[copies.tokens].add(out * copies.weights[:, None].astype(x.dtype)), gate, up


def ragged_backward(residuals: Residuals, dy: Array) -> tuple[Array, Array, Weights]:
  """`blocked_backward` by `ragged_dot`."""
  x, copies, weights, gates, ups = residuals
  rows, mine = x[copies.tokens], owned(copies)
  dy_rows = jnp.where(mine, dy[copies.tokens], 0)
  copy_weights = copies.weights[:, None].astype(x.dtype)

  def back(d: Array, w: Array) -> Array:
    return jnp.where(mine, jax.lax.ragged_dot(d, w.swapaxes(1, 2), copies.load), 0)

  def ragged_outer(a: Array, b: Array) -> Array:
    return jax.lax.ragged_dot_general(a, b, copies.load, RAGGED_OUTER)

  hidden, pull = jax.vjp(swiglu, gates, ups)
  d_hidden = back(dy_rows, weights.down)
  d_gate, d_up = pull(d_hidden * copy_weights)
  d_weights = Weights(*(ragged_outer(a, b) for a, b in ((rows, d_gate), (rows, d_up), (hidden * copy_weights, dy_rows))))
  dx = jnp.zeros_like(x).at[copies.tokens].add(back(d_gate, weights.gate) + back(d_up, weights.up))
  return dx, (d_hidden * hidden).sum(-1).astype(jnp.float32), d_weights


# name -> (forward, backward)
IMPLEMENTATIONS: dict[str, tuple[Forward, Backward]] = {
  'blocked': (blocked_forward, blocked_backward),
  'ragged_dot': (ragged_forward, ragged_backward),
}
BEST = {'cpu': 'blocked', 'gpu': 'blocked', 'tpu': 'ragged_dot'}
