"""Kernels: rows times the matrix of their expert, with what comes before and after fused in.

  gate_up            gathers tokens, multiplies by two matrices, applies the activation
  rows_times_matrix  multiplies rows by one or several matrices and adds up; weighs the result

Rows of the result that belong to no expert are never stored, and hold anything: what reads them
must select.

Letters: T tokens, N copies, D model, F FFN hidden, E experts, R rows and C columns of a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import PreActivations
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.triton.support import call_kernel, load, store
from moejax.moe.experts.triton.tile_products import (
  Left,
  accumulate,
  add_bias_of,
  own_tile,
  within_copies,
)
from moejax.moe.experts.triton.tiles import RowTiles, row_tiles, tile_sizes
from moejax.moe.experts.weights import Activation, Weights


class ForwardRows(NamedTuple):
  """What `gate_up` gives, a row for each sorted copy; of unassigned ones anything."""

  pre_activations: PreActivations  # [N, F] each
  hidden: Array  # [N, F]


def gate_up(x_TD: Array, copies: Copies, weights: Weights, activation: Activation) -> ForwardRows:
  """Returns the experts' pre-activations and hidden layers, from tokens gathered as they are read.

  The activation sees float32: the hidden layer is rounded once.
  """
  num_copies = copies.tokens.size
  _, depth, width = weights.gate.shape
  sizes = tile_sizes('gate_up', x_TD.dtype, copies, columns=width, depth=depth)
  tiles = row_tiles(copies.load, num_copies, sizes.rows)
  biases = () if weights.biases.gate is None else (weights.biases.gate, weights.biases.up)

  def kernel(
    expert: Array, first: Array, end: Array, tokens: Array, x: Array, *refs: Array
  ) -> None:
    stacks, bias_refs, outs = refs[:2], refs[2:-3], refs[-3:]
    gate_bias, up_bias = bias_refs or (None, None)
    tile = own_tile(RowTiles(expert, first, end), sizes, width)
    token_R = load(tokens, (within_copies(tile.rows_R, num_copies),))
    gate_RC, up_RC = accumulate(Left(x, token_R), stacks, tile, sizes)
    gate_RC = add_bias_of(gate_RC, gate_bias, tile)
    up_RC = add_bias_of(up_RC, up_bias, tile)
    for out, values_RC in zip(outs, (gate_RC, up_RC, activation(gate_RC, up_RC))):
      store(out, tile.indices, values_RC, tile.is_own_RC)

  shape = jax.ShapeDtypeStruct((num_copies, width), x_TD.dtype)
  gate, up, hidden = call_kernel(
    kernel,
    name='gate_up',
    grid=(-(-width // sizes.columns), tiles.first.size),
    out_shapes=(shape, shape, shape),
    arguments=(*tiles, copies.tokens, x_TD, weights.gate, weights.up, *biases),
    warps=sizes.warps,
    stages=sizes.stages,
  )
  return ForwardRows(PreActivations(gate, up), hidden)


def rows_times_matrix(
  pairs: tuple[tuple[Array, Array], ...],
  copies: Copies,
  bias: Array | None = None,
  is_weighted: bool = False,
  transposed: bool = False,
) -> Array:
  """Returns each row times its expert's matrix, summed over the pairs.

  Args:
    pairs: of rows [N, K'] and matrices [E, K', C'], or if transposed [E, C', K'].
    copies: which expert each row belongs to.
    bias: [E, C'], added before the weighting.
    is_weighted: whether each row of the result is multiplied by its copy's weight.
    transposed: see pairs.

  Returns:
    [N, C']; of unassigned rows anything.
  """
  rows, stack = pairs[0]
  num_copies, depth = rows.shape
  width = stack.shape[1 if transposed else 2]
  sizes = tile_sizes('rows_times_matrix', rows.dtype, copies, columns=width, depth=depth)
  tiles = row_tiles(copies.load, num_copies, sizes.rows)
  biases = () if bias is None else (bias,)

  def kernel(expert: Array, first: Array, end: Array, weights: Array, *refs: Array) -> None:
    *bias_refs, out = refs[2 * len(pairs) :]
    tile = own_tile(RowTiles(expert, first, end), sizes, width)
    rows_R = within_copies(tile.rows_R, num_copies)
    total_RC = jnp.zeros((sizes.rows, sizes.columns), jnp.float32)
    for left, matrices in zip(refs[0 : 2 * len(pairs) : 2], refs[1 : 2 * len(pairs) : 2]):
      (product_RC,) = accumulate(Left(left, rows_R), (matrices,), tile, sizes, transposed)
      total_RC += product_RC
    total_RC = add_bias_of(total_RC, bias_refs[0] if bias_refs else None, tile)
    if is_weighted:
      total_RC *= load(weights, (rows_R,))[:, None]
    store(out, tile.indices, total_RC, tile.is_own_RC)

  (out_NC,) = call_kernel(
    kernel,
    name='rows_times_transposed' if transposed else 'rows_times_matrix',
    grid=(-(-width // sizes.columns), tiles.first.size),
    out_shapes=(jax.ShapeDtypeStruct((num_copies, width), rows.dtype),),
    arguments=(*tiles, copies.weights, *(a for pair in pairs for a in pair), *biases),
    warps=sizes.warps,
    stages=sizes.stages,
  )
  return out_NC
