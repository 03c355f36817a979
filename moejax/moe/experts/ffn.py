"""The feed-forward network of an expert or a dense layer: activations, a flat matmul, and SwiGLU.

Letters: B batch, S sequence, D model, F FFN hidden.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.moe.saved_names import EXPERTS
from moejax.sharding.logical_axes import constrain
from moejax.sharding.params import normal_init, param


def matmul(x: Array, w: Array) -> Array:
  """Returns `x @ w` in the dtype of x, over a flat list of tokens. [..., D], [D, F] -> [..., F].

  XLA's CPU backend takes two to three times as long for the weight's gradient when tokens lie in
  two axes.
  """
  flat_y = x.reshape(-1, x.shape[-1]) @ w.astype(x.dtype)
  return flat_y.reshape(*x.shape[:-1], w.shape[1])


def swiglu(gate: Array, up: Array) -> Array:
  """Returns `silu(gate) * up`, from the two pre-activations (Shazeer 2020)."""
  return jax.nn.silu(gate) * up


def clamped_swiglu(gate: Array, up: Array, limit: float) -> Array:
  """Returns `(up + 1) gate sigmoid(1.702 gate)` (gpt-oss).

  First gate is cut to at most `limit`, and up to within it either way.
  """
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


# name -> limit to (gate, up) -> hidden, of routed experts
ACTIVATIONS: dict[str, Callable[[float], Callable[[Array, Array], Array]]] = {
  'clamped_swiglu': lambda limit: functools.partial(clamped_swiglu, limit=limit),
  'swiglu': lambda limit: swiglu,
}


class SwiGLU(nnx.Module):
  """The FFN of dense layers and shared experts: `down(silu(gate x) * up x)` (Shazeer 2020)."""

  def __init__(self, key: Array, d_model: int, d_ff: int, std: float, out_std: float = 0.0) -> None:
    keys = jax.random.split(key, 3)
    self.gate = param(keys[0], (d_model, d_ff), ('embed', 'mlp'), normal_init(std))
    self.up = param(keys[1], (d_model, d_ff), ('embed', 'mlp'), normal_init(std))
    self.down = param(keys[2], (d_ff, d_model), ('mlp', 'embed'), normal_init(out_std or std))

  def __call__(self, x: Array) -> Array:
    """Returns the FFN of every token. [B, S, D] -> [B, S, D]."""
    gate, up, down = self.gate[...], self.up[...], self.down[...]
    pre_activations = checkpoint_name((matmul(x, gate), matmul(x, up)), EXPERTS)
    hidden_BSF = swiglu(*pre_activations)
    # The hidden layer is split over `tensor`; the product with `down` sums over its parts.
    hidden_BSF = constrain(hidden_BSF, 'batch', 'sequence', 'mlp')
    return checkpoint_name(matmul(hidden_BSF, down), EXPERTS)
