"""Kernel: from the cotangents of tokens to those of the pre-activations, in one pass.

Cotangents are gathered as they are read, multiplied by down^T and go back through the activation,
so that the cotangent of the hidden layer never lies in memory.

Letters: T tokens, N copies, D model, F FFN hidden, E experts, R rows and C columns of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import PreActivations
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.triton.support import call_kernel, load, program_id, store
from moejax.moe.experts.triton.tile_products import Left, accumulate, own_tile, within_copies
from moejax.moe.experts.triton.tiles import RowTiles, TileSizes, row_tiles, tile_sizes
from moejax.moe.experts.weights import Activation


class HiddenGradients(NamedTuple):
  """What `hidden_gradient` gives, a row for each sorted copy; of unassigned ones anything."""

  gate: Array  # [N, F], cotangent of gate x
  up: Array  # [N, F], cotangent of up x
  weighted_hidden: Array  # [N, F], the hidden layer times the copy's weight
  copy_weights: Array  # [N] f32, cotangent of the copies' weights, but for the bias of down


def hidden_gradient(
  dy_TD: Array,
  copies: Copies,
  down: Array,
  pre_activations: PreActivations,
  activation: Activation,
) -> HiddenGradients:
  """Returns the cotangents of the pre-activations, from those of tokens, gathered as read.

  Args:
    dy_TD: [T, D].
    copies: N of them, sorted by expert.
    down: [E, F, D].
    pre_activations: [N, F] each, which the hidden layer is computed from once more.
    activation: differentiated in the kernel.
  """
  num_copies = copies.tokens.size
  _, width, depth = down.shape
  sizes = tile_sizes('hidden_gradient', dy_TD.dtype, copies, columns=width, depth=depth)
  tiles = row_tiles(copies.load, num_copies, sizes.rows)
  blocks = -(-width // sizes.columns)
  kernel = functools.partial(
    hidden_gradient_kernel, sizes=sizes, num_copies=num_copies, activation=activation
  )
  shape = jax.ShapeDtypeStruct((num_copies, width), dy_TD.dtype)
  # A program has some columns of a row's sum: their sums are added up below.
  partial_sums = jax.ShapeDtypeStruct((num_copies, blocks), jnp.float32)
  *rows, d_weights = call_kernel(
    kernel,
    name='hidden_gradient',
    grid=(blocks, tiles.first.size),
    out_shapes=(shape, shape, shape, partial_sums),
    arguments=(*tiles, copies.tokens, copies.weights, dy_TD, down, *pre_activations),
    warps=sizes.warps,
    stages=sizes.stages,
  )
  return HiddenGradients(*rows, d_weights.sum(1))


def hidden_gradient_kernel(
  expert: Array,
  first: Array,
  end: Array,
  tokens: Array,
  weights: Array,
  dy: Array,
  down: Array,
  gate: Array,
  up: Array,
  d_gate_out: Array,
  d_up_out: Array,
  weighted_out: Array,
  d_weights_out: Array,
  sizes: TileSizes,
  num_copies: int,
  activation: Activation,
) -> None:
  """Computes one tile of `hidden_gradient`; the arrays are references to memory."""
  tile = own_tile(RowTiles(expert, first, end), sizes, gate.shape[1])
  rows_R = within_copies(tile.rows_R, num_copies)
  token_R = load(tokens, (rows_R,))
  (d_hidden_RC,) = accumulate(Left(dy, token_R), (down,), tile, sizes, transposed=True)
  gate_RC = load(gate, tile.indices, tile.is_own_RC).astype(jnp.float32)
  up_RC = load(up, tile.indices, tile.is_own_RC).astype(jnp.float32)
  hidden_RC, pull = jax.vjp(activation, gate_RC, up_RC)
  weight_R1 = load(weights, (rows_R,))[:, None]
  d_gate_RC, d_up_RC = pull(d_hidden_RC * weight_R1)
  store(d_gate_out, tile.indices, d_gate_RC, tile.is_own_RC)
  store(d_up_out, tile.indices, d_up_RC, tile.is_own_RC)
  store(weighted_out, tile.indices, hidden_RC * weight_R1, tile.is_own_RC)
  # d_hidden is 0 in columns past the last, whose matrix was loaded as zeros.
  d_weights_R = (d_hidden_RC * hidden_RC).sum(1)
  store(d_weights_out, (tile.rows_R, program_id(0)), d_weights_R, tile.is_own_R)
