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


Residuals = tuple[Array, Copies, Weights, Array, Array]   # x, copies, weights, gate x, up x: [N or more, F]
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
  """(y [T, D], gate x, up x [N or more, F]), for the platform at hand."""
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


def block_sizes(num_copies: int, num_experts: int) -> tuple[int, ...]:
  """Rows of a block, ascending: whole blocks have the last size, an expert's rest the first one that holds it.

  Measured by benchmarks/moe_layer.py: larger blocks add weight gradients up less often, and smaller ones for the
  rest compute fewer rows in vain. The largest is 256 rows where an expert has as many, 128 below.
  """
  largest = 256 if num_copies // num_experts >= 256 else 128
  sizes = [size for size in (32, 64, 128, 256) if size <= largest]
  enough = next((i for i, size in enumerate(sizes) if size >= num_copies), len(sizes) - 1)
  return tuple(sizes[:enough + 1])


def zeros(like: Array, *shape: int) -> Array:
  """Zeros of the dtype of `like`, varying over the same mesh axes, as a loop's carry inside `shard_map` must."""
  return jax.lax.full_like(like, 0, shape=shape)


def padded(copies: Copies, rows: int) -> Copies:
  """With room for a block that begins at the last copy."""
  return copies._replace(tokens=jnp.pad(copies.tokens, (0, rows)), weights=jnp.pad(copies.weights, (0, rows)))


def for_blocks(load: Array, sizes: tuple[int, ...], e: Array, body: Callable, carry: tuple) -> tuple:
  """`carry = body(rows, at, mine, rest, carry)` for each block of expert e: its rest first, then its whole blocks.

  A block is the `rows` (static) copies from `at`; `mine` [rows] marks those that are this expert's. Rows past its
  last belong to later experts, or to the padding: what is written there is overwritten, or never read. `rest`
  (static) is True for the one block that comes first.
  """
  end, rows = jnp.cumsum(load)[e], load[e]
  begin, whole = end - rows, jnp.maximum(rows - 1, 0) // sizes[-1]
  left = rows - whole * sizes[-1]

  def block(size: int, start: Array, rest: bool, i: Array, carry: tuple) -> tuple:
    at = start + i * size
    return body(size, at, at + jnp.arange(size, dtype=at.dtype) < end, rest, carry)

  # Loops of no or one turn, not `switch`: XLA copies the buffers that a conditional writes to.
  for smaller, size in zip((0, *sizes), sizes):
    turns = ((left > smaller) & (left <= size)).astype(jnp.int32)
    carry = jax.lax.fori_loop(0, turns, functools.partial(block, size, begin + whole * sizes[-1], True), carry)
  return jax.lax.fori_loop(0, whole, functools.partial(block, sizes[-1], begin, False), carry)


def blocked_forward(x: Array, copies: Copies, weights: Weights) -> tuple[Array, Array, Array]:
  """See the top of the file. -> y [T, D]; gate x and up x [N + largest block, F]."""
  num_copies, (num_experts, _, d_ff) = copies.tokens.shape[0], weights.gate.shape
  sizes = block_sizes(num_copies, num_experts)
  tokens, copy_weights, load = padded(copies, sizes[-1])

  def expert(e: Array, carry: tuple) -> tuple:
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(rows: int, at: Array, mine: Array, rest: bool, carry: tuple) -> tuple:
      del rest
      y, gates, ups = carry
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=rows)
      here = take(tokens)
      x_block = x[here]
      gate, up = x_block @ w.gate, x_block @ w.up                        # [R, F]
      scale = jnp.where(mine, take(copy_weights), 0)[:, None].astype(x.dtype)
      y = y.at[here].add(scale * (swiglu(gate, up) @ w.down))
      return y, put(gates, gate, at), put(ups, up, at)

    return for_blocks(load, sizes, e, body, carry)

  empty = zeros(x, num_copies + sizes[-1], d_ff)
  return jax.lax.fori_loop(0, num_experts, expert, (zeros(x, *x.shape), empty, empty))


def blocked_backward(residuals: Residuals, dy: Array) -> tuple[Array, Array, Weights]:
  """-> dx [T, D], gradient of the copies' weights [N] f32, gradients of the projections."""
  x, copies, weights, gates, ups = residuals
  num_copies, num_experts = copies.tokens.shape[0], weights.gate.shape[0]
  sizes = block_sizes(num_copies, num_experts)
  tokens, copy_weights, load = padded(copies, sizes[-1])

  def expert(e: Array, carry: tuple) -> tuple:
    dx, d_copies, d_weights = carry
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(rows: int, at: Array, mine: Array, rest: bool, carry: tuple) -> tuple:
      dx, d_copies, total = carry
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=rows)
      here = take(tokens)
      x_block, dy_block = x[here], dy[here]
      scale = jnp.where(mine, take(copy_weights), 0)[:, None].astype(x.dtype)
      hidden, pull = jax.vjp(swiglu, take(gates), take(ups))             # [R, F]
      d_hidden = dy_block @ w.down.T                                     # of the output before its weight
      d_copies = put(d_copies, (d_hidden * hidden).sum(-1).astype(jnp.float32), at)
      d_gate, d_up = pull(d_hidden * scale)
      dw = Weights(outer(x_block, d_gate), outer(x_block, d_up), outer(hidden * scale, dy_block))
      # The first block is the sum so far: an addition less, of arrays as large as an expert.
      total = dw if rest else jax.tree.map(jnp.add, total, dw)
      return dx.at[here].add(d_gate @ w.gate.T + d_up @ w.up.T), d_copies, total

    nothing = jax.tree.map(lambda one: zeros(one.astype(jnp.float32), *one.shape), w)
    dx, d_copies, dw = for_blocks(load, sizes, e, body, (dx, d_copies, nothing))
    return dx, d_copies, jax.tree.map(lambda stacked, one: stacked.at[e].set(one.astype(x.dtype)), d_weights, dw)

  carry = (zeros(x, *x.shape), zeros(copy_weights, num_copies + sizes[-1]),
           jax.tree.map(lambda a: zeros(a, *a.shape), weights))
  dx, d_copies, d_weights = jax.lax.fori_loop(0, num_experts, expert, carry)
  return dx, jnp.where(owned(copies)[:, 0], d_copies[:num_copies], 0), d_weights


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
  d_weights = Weights(ragged_outer(rows, d_gate), ragged_outer(rows, d_up),
                      ragged_outer(hidden * copy_weights, dy_rows))
  dx = jnp.zeros_like(x).at[copies.tokens].add(back(d_gate, weights.gate) + back(d_up, weights.up))
  return dx, (d_hidden * hidden).sum(-1).astype(jnp.float32), d_weights


# name -> (forward, backward)
IMPLEMENTATIONS: dict[str, tuple[Forward, Backward]] = {
  'blocked': (blocked_forward, blocked_backward),
  'ragged_dot': (ragged_forward, ragged_backward),
}
BEST = {'cpu': 'blocked', 'gpu': 'blocked', 'tpu': 'ragged_dot'}
