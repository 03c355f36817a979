"""The feed-forward network of an expert or a dense layer: activations, a flat matmul, and SwiGLU.

Letters: B batch, S sequence, D model, F FFN hidden.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.sharding.logical_axes import constrain
from moejax.sharding.params import normal_init, param


def matmul(x: Array, w: Array) -> Array:
  """`x @ w` in the dtype of x, over a flat list of tokens. [..., D], [D, F] -> [..., F].

  XLA's CPU backend takes two to three times as long for the weight's gradient when tokens lie in two axes.
  """
  return (x.reshape(-1, x.shape[-1]) @ w.astype(x.dtype)).reshape(*x.shape[:-1], w.shape[1])


def swiglu(gate: Array, up: Array) -> Array:
  """`silu(gate) * up`, from the two pre-activations."""
  return jax.nn.silu(gate) * up


def clamped_swiglu(gate: Array, up: Array, limit: float) -> Array:
  """gpt-oss: `(up + 1) gate sigmoid(1.702 gate)`, gate at most `limit`, up within it either way."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


# name -> limit to (gate, up) -> hidden, of routed experts
ACTIVATIONS: dict[str, Callable[[float], Callable[[Array, Array], Array]]] = {
  'clamped_swiglu': lambda limit: functools.partial(clamped_swiglu, limit=limit),
  'swiglu': lambda limit: swiglu,
}


class SwiGLU(nnx.Module):
  """`down(silu(gate x) * up x)` (Shazeer 2020): the FFN of dense layers, and of the shared experts."""

  def __init__(self, key: Array, d_model: int, d_ff: int, std: float, out_std: float = 0.0) -> None:
    keys = jax.random.split(key, 3)
    self.gate = param(keys[0], (d_model, d_ff), ('embed', 'mlp'), normal_init(std))
    self.up = param(keys[1], (d_model, d_ff), ('embed', 'mlp'), normal_init(std))
    self.down = param(keys[2], (d_ff, d_model), ('mlp', 'embed'), normal_init(out_std or std))

  def __call__(self, x: Array) -> Array:  # [B, S, D] -> [B, S, D]
    gate, up, down = (w[...] for w in (self.gate, self.up, self.down))
    hidden = constrain(swiglu(matmul(x, gate), matmul(x, up)), 'batch', 'sequence', 'mlp')
    return matmul(hidden, down)
