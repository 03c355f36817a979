"""The grouped FFN as a loop over experts around a loop over that expert's blocks of rows.

The inner loop is of dynamic length, so that nothing is padded and nothing is computed for an expert
without copies. An expert's gradients are summed in its carry, so that each is written once.

Letters: T tokens, D model, F FFN hidden, E experts, N copies, R rows in a block, P = N + the
largest block: copies with room for a block that begins at the last one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import FfnGradients, PreActivations, Residuals
from moejax.moe.experts.sorted_copies import Copies, assigned_mask
from moejax.moe.experts.weights import Activation, Biases, Weights, add_bias

Carry = TypeVar('Carry')


class Block(NamedTuple):
  """R of the sorted copies that lie one after another, the first of which belong to one expert.

  Rows past the expert's last belong to later experts, or to the padding: what is written there is
  overwritten, or never read.
  """

  size: int  # R, static
  start: Array  # scalar i32, the first copy
  owned: Array  # [R] bool, rows that are copies of this expert
  is_first: bool  # static: the one block that the expert's loop begins with

  def slice(self, per_copy: Array) -> Array:
    """Returns the block's rows of an array over copies. [P, ...] -> [R, ...]."""
    return jax.lax.dynamic_slice_in_dim(per_copy, self.start, self.size)

  def write(self, per_copy: Array, rows: Array) -> Array:
    """Returns [P, ...] with the block's rows replaced by [R, ...]."""
    return jax.lax.dynamic_update_slice_in_dim(per_copy, rows, self.start, axis=0)

  def scale(self, copy_weights_P: Array, dtype: jnp.dtype) -> Array:
    """[R, 1]: what the rows' outputs are multiplied by; 0 for rows of other experts."""
    return jnp.where(self.owned, self.slice(copy_weights_P), 0)[:, None].astype(dtype)


def block_sizes(num_copies: int, num_experts: int) -> tuple[int, ...]:
  """Returns rows of a block, ascending: the last for whole blocks, for a rest the first to hold it.

  Measured by benchmarks/moe_layer.py: larger blocks add weight gradients up less often, and smaller
  ones for the rest compute fewer rows in vain. The largest is 256 rows where an expert has as many,
  128 below.
  """
  largest = 256 if num_copies // num_experts >= 256 else 128
  sizes: list[int] = []
  for size in (32, 64, 128, 256):
    if size <= largest:
      sizes.append(size)
    # No block is ever fuller than all copies: a larger size would be a loop that never turns.
    if size >= num_copies:
      break
  return tuple(sizes)


def zeros(like: Array, *shape: int) -> Array:
  """Returns zeros like `like`, varying over the same mesh axes: a carry in `shard_map` must."""
  return jax.lax.full_like(like, 0, shape=shape)


def pad_copies(copies: Copies, rows: int) -> Copies:
  """Returns the copies with room for a block of `rows` that begins at the last one. [N] -> [P]."""
  return copies._replace(
    tokens=jnp.pad(copies.tokens, (0, rows)), weights=jnp.pad(copies.weights, (0, rows))
  )


def loop_over_blocks(
  load_E: Array,
  sizes: tuple[int, ...],
  e: Array,
  body: Callable[[Block, Carry], Carry],
  carry: Carry,
) -> Carry:
  """Returns the carry after `carry = body(block, carry)` for each block of expert e.

  The expert's rest, at most one block of its last rows, comes first; then its whole blocks.

  Args:
    load_E: [E] i32, copies of each expert.
    sizes: see `block_sizes`.
    e: scalar i32.
    body: traced once for each size, since a block's size is static.
    carry: of the first call.
  """
  end = jnp.cumsum(load_E)[e]
  num_rows = load_E[e]
  begin = end - num_rows
  # An expert with rows always has a rest: of exactly whole blocks it is the last one.
  num_whole = jnp.maximum(num_rows - 1, 0) // sizes[-1]
  rest_rows = num_rows - num_whole * sizes[-1]

  def run_block(size: int, first_start: Array, is_rest: bool, i: Array, carry: Carry) -> Carry:
    start = first_start + i * size
    owned_R = start + jnp.arange(size, dtype=start.dtype) < end
    return body(Block(size, start, owned_R, is_first=is_rest), carry)

  rest_start = begin + num_whole * sizes[-1]
  # Loops of no or one turn, not `switch`: XLA copies the buffers that a conditional writes to.
  for smaller, size in zip((0, *sizes), sizes):
    turns = ((rest_rows > smaller) & (rest_rows <= size)).astype(jnp.int32)
    run_rest = functools.partial(run_block, size, rest_start, True)
    carry = jax.lax.fori_loop(0, turns, run_rest, carry)
  run_whole = functools.partial(run_block, sizes[-1], begin, False)
  return jax.lax.fori_loop(0, num_whole, run_whole, carry)


def blocked_forward(
  x_TD: Array, copies: Copies, weights: Weights, activation: Activation, even_share: int = 0
) -> tuple[Array, PreActivations]:
  """Returns y [T, D] and the pre-activations [P, F].

  A block's rows are gathered, go through gate, up, activation and down of one expert, are weighed,
  and are added to their tokens.

  Args:
    x_TD: [T, D] in the compute dtype.
    copies: N of them, sorted by expert.
    weights: of all E experts.
    activation: of the gate and the up projection.
    even_share: not looked at: what has no copy costs nothing.
  """
  del even_share
  num_copies = copies.tokens.shape[0]
  num_experts, _, d_ff = weights.gate.shape
  sizes = block_sizes(num_copies, num_experts)
  tokens_P, copy_weights_P, load_E = pad_copies(copies, sizes[-1])

  def run_expert(e: Array, carry: tuple[Array, PreActivations]) -> tuple[Array, PreActivations]:
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(block: Block, carry: tuple[Array, PreActivations]) -> tuple[Array, PreActivations]:
      y_TD, pre_PF = carry
      tokens_R = block.slice(tokens_P)
      x_RD = x_TD[tokens_R]
      gate_RF = add_bias(x_RD @ w.gate, w.biases.gate)
      up_RF = add_bias(x_RD @ w.up, w.biases.up)
      scale_R1 = block.scale(copy_weights_P, x_TD.dtype)
      # With a bias, rows of other experts do not give zeros: it is their scale that is 0.
      out_RD = add_bias(activation(gate_RF, up_RF) @ w.down, w.biases.down)
      y_TD = y_TD.at[tokens_R].add(scale_R1 * out_RD)
      gate_PF, up_PF = block.write(pre_PF.gate, gate_RF), block.write(pre_PF.up, up_RF)
      return y_TD, PreActivations(gate_PF, up_PF)

    return loop_over_blocks(load_E, sizes, e, body, carry)

  empty_PF = zeros(x_TD, num_copies + sizes[-1], d_ff)
  carry = zeros(x_TD, *x_TD.shape), PreActivations(empty_PF, empty_PF)
  return jax.lax.fori_loop(0, num_experts, run_expert, carry)


def blocked_backward(
  residuals: Residuals, activation: Activation, dy_TD: Array, even_share: int = 0
) -> FfnGradients:
  """Returns the gradients of `blocked_forward`'s arguments from what it kept.

  Args:
    residuals: of `blocked_forward`.
    activation: the same as in the forward pass.
    dy_TD: [T, D], the cotangent of y.
  """
  del even_share
  x_TD, copies, weights, pre_PF = residuals
  num_copies, num_experts = copies.tokens.shape[0], weights.gate.shape[0]
  sizes = block_sizes(num_copies, num_experts)
  tokens_P, copy_weights_P, load_E = pad_copies(copies, sizes[-1])

  def run_expert(e: Array, carry: FfnGradients) -> FfnGradients:
    w = jax.tree.map(lambda stacked: stacked[e], weights)

    def body(block: Block, carry: FfnGradients) -> FfnGradients:
      tokens_R = block.slice(tokens_P)
      x_RD, dy_RD = x_TD[tokens_R], dy_TD[tokens_R]
      scale_R1 = block.scale(copy_weights_P, x_TD.dtype)
      gate_RF, up_RF = block.slice(pre_PF.gate), block.slice(pre_PF.up)
      hidden_RF, pull = jax.vjp(activation, gate_RF, up_RF)
      # Of the output before its weight: d_scale is its product with the hidden layer.
      d_hidden_RF = dy_RD @ w.down.T
      d_scale_R = (d_hidden_RF * hidden_RF).sum(-1)
      d_gate_RF, d_up_RF = pull(d_hidden_RF * scale_R1)
      dw = Weights(
        gate=sum_outer(x_RD, d_gate_RF),
        up=sum_outer(x_RD, d_up_RF),
        down=sum_outer(hidden_RF * scale_R1, dy_RD),
      )
      if w.biases.down is not None:
        d_scale_R += dy_RD @ w.biases.down
        dw = dw._replace(biases=bias_gradients(d_gate_RF, d_up_RF, dy_RD * scale_R1))
      d_scale_P = block.write(carry.copy_weights, d_scale_R.astype(jnp.float32))
      # The first block is the sum so far: an addition less, of arrays as large as an expert.
      dw_sum = dw if block.is_first else jax.tree.map(jnp.add, carry.weights, dw)
      # Of rows of other experts d_gate and d_up are 0, by their scale: they add nothing.
      dx_TD = carry.x.at[tokens_R].add(d_gate_RF @ w.gate.T + d_up_RF @ w.up.T)
      return FfnGradients(dx_TD, d_scale_P, dw_sum)

    # In float32 until the sum over blocks is complete, then in the compute dtype.
    no_dw = jax.tree.map(lambda one: zeros(one.astype(jnp.float32), *one.shape), w)
    own = loop_over_blocks(load_E, sizes, e, body, carry._replace(weights=no_dw))
    d_weights = jax.tree.map(
      lambda stacked, one: stacked.at[e].set(one.astype(x_TD.dtype)), carry.weights, own.weights
    )
    return own._replace(weights=d_weights)

  carry = jax.tree.map(lambda a: zeros(a, *a.shape), FfnGradients(x_TD, copy_weights_P, weights))
  gradients = jax.lax.fori_loop(0, num_experts, run_expert, carry)
  # A block also writes the rows past its expert's last, and nothing overwrites the unassigned.
  is_assigned_N = assigned_mask(copies)[:, 0]
  d_scale_N = jnp.where(is_assigned_N, gradients.copy_weights[:num_copies], 0)
  return gradients._replace(copy_weights=d_scale_N)


def sum_outer(a_RI: Array, b_RJ: Array) -> Array:
  """Returns `a^T b` in float32: blocks add up, and bfloat16 would lose the small ones. [I, J]."""
  return jnp.einsum('ri,rj->ij', a_RI, b_RJ, preferred_element_type=jnp.float32)


def bias_gradients(d_gate_RF: Array, d_up_RF: Array, d_out_RD: Array) -> Biases:
  """Returns the sums over a block's rows, [F], [F] and [D], in float32 as `sum_outer` does."""
  return Biases(
    gate=d_gate_RF.sum(0, dtype=jnp.float32),
    up=d_up_RF.sum(0, dtype=jnp.float32),
    down=d_out_RD.sum(0, dtype=jnp.float32),
  )
