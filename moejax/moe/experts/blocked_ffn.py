"""The grouped FFN as a loop over experts around a loop over that expert's blocks of rows.

The inner loop is of dynamic length, so that nothing is padded and nothing is computed for an expert that nobody chose.
An expert's gradients are summed in its carry, so that each is written once.

Letters: T tokens, D model, F FFN hidden, E experts, N copies, R rows in a block.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies, owned
from moejax.moe.experts.weights import Activation, Biases, Weights, plus


def block_sizes(num_copies: int, num_experts: int) -> tuple[int, ...]:
  """Rows of a block, ascending: whole blocks have the last size, an expert's rest the first one that holds it.

  Measured by benchmarks/moe_layer.py: larger blocks add weight gradients up less often, and smaller ones for the
  rest compute fewer rows in vain. The largest is 256 rows where an expert has as many, 128 below.
  """
  largest = 256 if num_copies // num_experts >= 256 else 128
  sizes = [size for size in (32, 64, 128, 256) if size <= largest]
  enough = next((i for i, size in enumerate(sizes) if size >= num_copies), len(sizes) - 1)
  return tuple(sizes[: enough + 1])


def zeros(like: Array, *shape: int) -> Array:
  """Zeros of the dtype of `like`, varying over the same mesh axes, as a loop's carry inside `shard_map` must."""
  return jax.lax.full_like(like, 0, shape=shape)


def padded(copies: Copies, rows: int) -> Copies:
  """With room for a block that begins at the last copy."""
  return copies._replace(
    tokens=jnp.pad(copies.tokens, (0, rows)), weights=jnp.pad(copies.weights, (0, rows))
  )


def for_blocks(
  load: Array, sizes: tuple[int, ...], e: Array, body: Callable, carry: tuple
) -> tuple:
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
    carry = jax.lax.fori_loop(
      0, turns, functools.partial(block, size, begin + whole * sizes[-1], True), carry
    )
  return jax.lax.fori_loop(0, whole, functools.partial(block, sizes[-1], begin, False), carry)


def blocked_forward(
  x: Array, copies: Copies, weights: Weights, activation: Activation
) -> tuple[Array, Array, Array]:
  """gather a block's rows -> pre-activations -> hidden -> down -> weigh -> add to the block's tokens.

  -> y [T, D]; the pre-activations gate x and up x [N + largest block, F].
  """
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
      gate, up = plus(x_block @ w.gate, w.biases.gate), plus(x_block @ w.up, w.biases.up)  # [R, F]
      scale = jnp.where(mine, take(copy_weights), 0)[:, None].astype(x.dtype)
      y = y.at[here].add(scale * plus(activation(gate, up) @ w.down, w.biases.down))
      return y, put(gates, gate, at), put(ups, up, at)

    return for_blocks(load, sizes, e, body, carry)

  empty = zeros(x, num_copies + sizes[-1], d_ff)
  return jax.lax.fori_loop(0, num_experts, expert, (zeros(x, *x.shape), empty, empty))


def blocked_backward(
  x: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  gates: Array,
  ups: Array,
  dy: Array,
) -> tuple[Array, Array, Weights]:
  """From what `blocked_forward` was given, what it kept, and dy [T, D].

  -> dx [T, D], gradient of the copies' weights [N] f32, gradients of the projections.
  """
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
      hidden, pull = jax.vjp(activation, take(gates), take(ups))  # [R, F]
      d_hidden = dy_block @ w.down.T  # of the output before its weight
      d_scale = (d_hidden * hidden).sum(-1)  # [R]
      d_gate, d_up = pull(d_hidden * scale)
      dw = Weights(outer(x_block, d_gate), outer(x_block, d_up), outer(hidden * scale, dy_block))
      if w.biases.down is not None:
        d_scale += dy_block @ w.biases.down
        dw = dw._replace(
          biases=Biases(*(d.sum(0, dtype=jnp.float32) for d in (d_gate, d_up, dy_block * scale)))
        )
      d_copies = put(d_copies, d_scale.astype(jnp.float32), at)
      # The first block is the sum so far: an addition less, of arrays as large as an expert.
      total = dw if rest else jax.tree.map(jnp.add, total, dw)
      return dx.at[here].add(d_gate @ w.gate.T + d_up @ w.up.T), d_copies, total

    nothing = jax.tree.map(lambda one: zeros(one.astype(jnp.float32), *one.shape), w)
    dx, d_copies, dw = for_blocks(load, sizes, e, body, (dx, d_copies, nothing))
    return (
      dx,
      d_copies,
      jax.tree.map(lambda stacked, one: stacked.at[e].set(one.astype(x.dtype)), d_weights, dw),
    )

  carry = (
    zeros(x, *x.shape),
    zeros(copy_weights, num_copies + sizes[-1]),
    jax.tree.map(lambda a: zeros(a, *a.shape), weights),
  )
  dx, d_copies, d_weights = jax.lax.fori_loop(0, num_experts, expert, carry)
  return dx, jnp.where(owned(copies)[:, 0], d_copies[:num_copies], 0), d_weights


def outer(a: Array, b: Array) -> Array:
  """`a^T b` in float32: blocks of an expert add up, and bfloat16 would lose the small ones."""
  return jnp.einsum('ri,rj->ij', a, b, preferred_element_type=jnp.float32)


def put(buffer: Array, block: Array, at: Array) -> Array:
  """`buffer` with `block` written at row `at`."""
  return jax.lax.dynamic_update_slice_in_dim(buffer, block, at, axis=0)
