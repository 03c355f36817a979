"""The experts: their stacked projections, and their FFN in dense and in batched layout.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token, C capacity.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.sharding.params import constant_init, is_param, normal_init, param

Activation = Callable[
  [Array, Array], Array
]  # the pre-activations gate x and up x -> hidden, entry by entry


class Biases(NamedTuple):
  """Of the projections, in the compute dtype. All, or none of them: an empty tree."""

  gate: Array | None = None  # [E, F]
  up: Array | None = None  # [E, F]
  down: Array | None = (
    None  # [E, D]  inside the weighting: a copy adds weight * (hidden down + bias)
  )


class Weights(NamedTuple):
  """The experts' projections, all in the compute dtype."""

  gate: Array  # [E, D, F]
  up: Array  # [E, D, F]
  down: Array  # [E, F, D]
  biases: Biases = Biases()


class Experts(nnx.Module):
  """E gated FFNs as stacked arrays, split over the `expert` mesh axis. Biases start at 0."""

  def __init__(
    self,
    key: Array,
    num_experts: int,
    d_model: int,
    d_expert: int,
    std: float,
    out_std: float,
    bias: bool,
  ) -> None:
    keys = jax.random.split(key, 3)
    wide, narrow = (num_experts, d_model, d_expert), (num_experts, d_expert, d_model)
    self.gate = param(keys[0], wide, ('expert', 'embed', 'mlp'), normal_init(std))
    self.up = param(keys[1], wide, ('expert', 'embed', 'mlp'), normal_init(std))
    self.down = param(keys[2], narrow, ('expert', 'mlp', 'embed'), normal_init(out_std))
    self.gate_bias, self.up_bias, self.down_bias = (
      param(key, (num_experts, width), ('expert', 'norm'), constant_init(0.0)) if bias else None
      for width in (d_expert, d_expert, d_model)
    )

  def weights(self, dtype: jnp.dtype) -> Weights:
    """The projections in the compute dtype."""
    weights = Weights(
      self.gate, self.up, self.down, Biases(self.gate_bias, self.up_bias, self.down_bias)
    )
    return jax.tree.map(lambda w: w[...].astype(dtype), weights, is_leaf=is_param)


def plus(y: Array, bias: Array | None) -> Array:
  """`y + bias`, where there is one."""
  return y if bias is None else y + bias


def dense_ffn(x: Array, combine: Array, weights: Weights, activation: Activation) -> Array:
  """Every expert on every token, E/K times the work of the others, exact and without a sort.

  Args:
    x: [T, D].
    combine: [T, E] f32, the weight of each expert's output, 0 where it was not chosen.

  Returns:
    [T, D].
  """
  # All experts side by side in one matrix: a product of two matrices is what every backend does best.
  num_experts, d_model, d_ff = weights.gate.shape
  biases = jax.tree.map(jnp.ravel, weights.biases)  # [E * F]
  gate, up = (
    plus(x @ w.swapaxes(0, 1).reshape(d_model, -1), bias)  # [T, E * F]
    for w, bias in ((weights.gate, biases.gate), (weights.up, biases.up))
  )
  combine = combine.astype(x.dtype)
  hidden = activation(gate, up).reshape(-1, num_experts, d_ff) * combine[..., None]
  y = hidden.reshape(-1, num_experts * d_ff) @ weights.down.reshape(-1, d_model)
  return y if weights.biases.down is None else y + combine @ weights.biases.down


def batched_ffn(x: Array, weights: Weights, activation: Activation) -> Array:
  """Each expert on its own buffer of rows. [E, C, D] -> [E, C, D]. With biases, rows of zeros do not give zeros."""
  biases = jax.tree.map(lambda bias: bias[:, None], weights.biases)
  hidden = activation(
    plus(jnp.einsum('ecd,edf->ecf', x, weights.gate), biases.gate),
    plus(jnp.einsum('ecd,edf->ecf', x, weights.up), biases.up),
  )
  return plus(jnp.einsum('ecf,efd->ecd', hidden, weights.down), biases.down)
