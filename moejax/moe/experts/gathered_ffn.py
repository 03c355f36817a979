"""The grouped FFN of few copies, as in decoding: each copy's expert is gathered, and no other is read.

Letters: T tokens, D model, F FFN hidden, E experts, N copies.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.experts.sorted_copies import Copies, expert_of, owned
from moejax.moe.experts.weights import Activation, Weights, plus


def gathered_forward(
  x: Array, copies: Copies, weights: Weights, activation: Activation
) -> tuple[Array, Array, Array]:
  """`blocked_forward` from an expert for each copy, [N, D, F] and [N, F, D]; gate x and up x [N, F]."""
  rows = x[copies.tokens]
  w = jax.tree.map(lambda stacked: stacked[expert_of(copies)], weights)
  gate, up = (
    plus(jnp.einsum('nd,ndf->nf', rows, of), bias)
    for of, bias in ((w.gate, w.biases.gate), (w.up, w.biases.up))
  )
  out = plus(jnp.einsum('nf,nfd->nd', activation(gate, up), w.down), w.biases.down)
  scale = jnp.where(owned(copies), copies.weights[:, None], 0).astype(x.dtype)
  return jnp.zeros_like(x).at[copies.tokens].add(scale * out), gate, up


def gathered_backward(
  x: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  gates: Array,
  ups: Array,
  dy: Array,
) -> tuple[Array, Array, Weights]:
  """`blocked_backward`, by computing everything again: nobody trains on so few tokens."""
  del gates, ups

  def forward(x: Array, copy_weights: Array, weights: Weights) -> Array:
    return gathered_forward(x, copies._replace(weights=copy_weights), weights, activation)[0]

  return jax.vjp(forward, x, copies.weights, weights)[1](dy)
