"""The grouped FFN in kernels of our own, for NVIDIA GPUs.

  forward:   gate_up -> rows_times_matrix (down, weighed) -> token_sums
  backward:  hidden_gradient -> outer_products, three of them
                             -> rows_times_matrix (gate^T and up^T) -> token_sums

The number of launches does not depend on the number of experts or on the load, and nothing is
padded. Interpreted, slowly, on platforms that are no GPU.

Letters: T tokens, D model, F FFN hidden, E experts, N copies.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import FfnGradients, PreActivations, Residuals
from moejax.moe.experts.sorted_copies import Copies, assigned_mask, expert_of_copies
from moejax.moe.experts.triton.hidden_gradient import hidden_gradient
from moejax.moe.experts.triton.outer_products import outer_products
from moejax.moe.experts.triton.products import gate_up, rows_times_matrix
from moejax.moe.experts.triton.token_sums import by_token, token_sums
from moejax.moe.experts.weights import Activation, Biases, Weights


def triton_forward(
  x_TD: Array, copies: Copies, weights: Weights, activation: Activation, even_share: int = 0
) -> tuple[Array, PreActivations]:
  """Returns what `blocked_forward` does; N pre-activations, anything for unassigned copies.

  Args:
    x_TD: [T, D], float32 or in half precision; sums are in float32.
    copies: N of them, sorted by expert.
    weights: of all E experts.
    activation: of the gate and the up projection; it is traced inside a kernel.
    even_share: not looked at: what has no copy costs nothing.
  """
  del even_share
  pre_activations, hidden_NF = gate_up(x_TD, copies, weights, activation)
  out_ND = rows_times_matrix(
    ((hidden_NF, weights.down),), copies, bias=weights.biases.down, is_weighted=True
  )
  return token_sums(out_ND, by_token(copies, len(x_TD))), pre_activations


def triton_backward(
  residuals: Residuals, activation: Activation, dy_TD: Array, even_share: int = 0
) -> FfnGradients:
  """Returns what `blocked_backward` does, from what `triton_forward` kept."""
  del even_share
  x_TD, copies, weights, pre_activations = residuals
  back = hidden_gradient(dy_TD, copies, weights.down, pre_activations, activation)
  has_bias = weights.biases.down is not None
  d_gate = outer_products(x_TD, back.gate, copies, gather_a=True, with_sums=has_bias)
  d_up = outer_products(x_TD, back.up, copies, gather_a=True, with_sums=has_bias)
  d_down = outer_products(back.weighted_hidden, dy_TD, copies, gather_b=True)
  d_weights = Weights(d_gate.products, d_up.products, d_down.products)
  d_scale_N = back.copy_weights
  if has_bias:
    d_biases = Biases(
      gate=d_gate.sums.astype(x_TD.dtype),
      up=d_up.sums.astype(x_TD.dtype),
      down=down_bias_gradient(dy_TD, copies),
    )
    d_weights = d_weights._replace(biases=d_biases)
    d_scale_N += down_bias_share(dy_TD, copies, weights.biases.down)
  rows_ND = rows_times_matrix(
    ((back.gate, weights.gate), (back.up, weights.up)), copies, transposed=True
  )
  dx_TD = token_sums(rows_ND, by_token(copies, len(x_TD)))
  # The kernels leave anything in rows that are no expert's.
  d_scale_N = jnp.where(assigned_mask(copies)[:, 0], d_scale_N, 0)
  return FfnGradients(dx_TD, d_scale_N, d_weights)


def down_bias_gradient(dy_TD: Array, copies: Copies) -> Array:
  """Returns the sum of each expert's weighted cotangents, [E, D]: a product with a [T, E] matrix.

  A token has no expert twice, so each entry of that matrix is one copy's weight.
  """
  num_experts = copies.load.size
  weights_N = jnp.where(assigned_mask(copies)[:, 0], copies.weights, 0)
  nothing_TE = jnp.zeros_like(copies.weights, shape=(len(dy_TD), num_experts))
  combine_TE = nothing_TE.at[copies.tokens, expert_of_copies(copies)].add(weights_N)
  combine_TE = combine_TE.astype(dy_TD.dtype)
  sums_ED = jax.lax.dot_general(
    combine_TE, dy_TD, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
  return sums_ED.astype(dy_TD.dtype)


def down_bias_share(dy_TD: Array, copies: Copies, bias_ED: Array) -> Array:
  """Returns the down bias's part of the cotangents of the copies' weights: dy times bias. [N]."""
  products_TE = jnp.matmul(dy_TD, bias_ED.T, preferred_element_type=jnp.float32)
  return products_TE[copies.tokens, expert_of_copies(copies)]
