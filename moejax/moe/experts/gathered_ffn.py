"""The grouped FFN of few copies, as in decoding: each copy's expert is gathered, no other is read.

Letters: T tokens, D model, F FFN hidden, E experts, N copies.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.residuals import FfnGradients, PreActivations, Residuals
from moejax.moe.experts.sorted_copies import Copies, assigned_mask, expert_of_copies
from moejax.moe.experts.weights import Activation, Weights, add_bias


def gathered_forward(
  x_TD: Array, copies: Copies, weights: Weights, activation: Activation, even_share: int = 0
) -> tuple[Array, PreActivations]:
  """Returns what `blocked_forward` does, from a gathered expert for each copy; N pre-activations.

  Args:
    x_TD: [T, D] in the compute dtype.
    copies: N of them, sorted by expert.
    weights: of all E experts; gathered to [N, D, F] and [N, F, D].
    activation: of the gate and the up projection.
    even_share: not looked at: there is room for few copies.
  """
  del even_share
  x_ND = x_TD[copies.tokens]
  # Every copy brings its own matrices: for a few copies less to read than all experts are.
  w = jax.tree.map(lambda stacked: stacked[expert_of_copies(copies)], weights)
  gate_NF = add_bias(jnp.einsum('nd,ndf->nf', x_ND, w.gate), w.biases.gate)
  up_NF = add_bias(jnp.einsum('nd,ndf->nf', x_ND, w.up), w.biases.up)
  hidden_NF = activation(gate_NF, up_NF)
  out_ND = add_bias(jnp.einsum('nf,nfd->nd', hidden_NF, w.down), w.biases.down)
  # Unassigned copies went through the last expert: their scale is 0.
  scale_N1 = jnp.where(assigned_mask(copies), copies.weights[:, None], 0).astype(x_TD.dtype)
  y_TD = jnp.zeros_like(x_TD).at[copies.tokens].add(scale_N1 * out_ND)
  return y_TD, PreActivations(gate_NF, up_NF)


def gathered_backward(
  residuals: Residuals, activation: Activation, dy_TD: Array, even_share: int = 0
) -> FfnGradients:
  """Returns what `blocked_backward` does, by computing everything again.

  It is there so that small models differentiate: training batches have many more copies than
  experts.
  """
  del even_share
  copies = residuals.copies

  def forward(x_TD: Array, copy_weights_N: Array, weights: Weights) -> Array:
    weighted = copies._replace(weights=copy_weights_N)
    return gathered_forward(x_TD, weighted, weights, activation)[0]

  _, pull = jax.vjp(forward, residuals.x, copies.weights, residuals.weights)
  return FfnGradients(*pull(dy_TD))
