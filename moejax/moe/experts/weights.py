"""The experts: their stacked projections, and their FFN in dense and in batched layout.

Letters: T tokens, D model, F FFN hidden, E experts, H = E * F the hidden layers of all experts side
by side, K experts per token, C capacity.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.moe.saved_names import EXPERTS
from moejax.sharding.params import constant_init, is_param, normal_init, param

# The pre-activations gate x and up x -> hidden, entry by entry.
Activation = Callable[[Array, Array], Array]


# The logical axes of gate and up, and of down.
WIDE_AXES = ('expert', 'embed', 'mlp')
NARROW_AXES = ('expert', 'mlp', 'embed')


class Biases(NamedTuple):
  """The projections' biases in the compute dtype. All, or none of them: an empty tree."""

  gate: Array | None = None  # [E, F]
  up: Array | None = None  # [E, F]
  # [E, D]; inside the weighting: a copy adds weight * (hidden down + bias).
  down: Array | None = None


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
    gate_key, up_key, down_key = jax.random.split(key, 3)
    wide, narrow = (num_experts, d_model, d_expert), (num_experts, d_expert, d_model)
    self.gate = param(gate_key, wide, WIDE_AXES, normal_init(std))
    self.up = param(up_key, wide, WIDE_AXES, normal_init(std))
    self.down = param(down_key, narrow, NARROW_AXES, normal_init(out_std))

    def bias_param(width: int) -> nnx.Param | None:
      # A constant needs no randomness: `key` is not drawn from. 'norm' keeps the width whole.
      shape = (num_experts, width)
      return param(key, shape, ('expert', 'norm'), constant_init(0.0)) if bias else None

    self.gate_bias, self.up_bias = bias_param(d_expert), bias_param(d_expert)
    self.down_bias = bias_param(d_model)

  def weights(self, dtype: jnp.dtype) -> Weights:
    """Returns the projections in the compute dtype."""
    biases = Biases(self.gate_bias, self.up_bias, self.down_bias)
    weights = Weights(self.gate, self.up, self.down, biases)
    return jax.tree.map(lambda w: w[...].astype(dtype), weights, is_leaf=is_param)


def add_bias(y: Array, bias: Array | None) -> Array:
  """Returns `y + bias`, or y itself for experts without biases."""
  return y if bias is None else y + bias


def dense_ffn(x: Array, combine: Array, weights: Weights, activation: Activation) -> Array:
  """Returns the weighted sum of every expert on every token.

  E/K times the work of the other ways, exact and without a sort.

  Args:
    x: [T, D].
    combine: [T, E] f32, the weight of each expert's output, 0 where it was not chosen.
    weights: of all E experts.
    activation: of the gate and the up projection.

  Returns:
    [T, D].
  """
  # All experts side by side in one matrix: a product of two matrices is what every backend does
  # best.
  num_experts, d_model, d_ff = weights.gate.shape
  biases_H = jax.tree.map(jnp.ravel, weights.biases)
  gate_TH = add_bias(x @ side_by_side(weights.gate), biases_H.gate)
  up_TH = add_bias(x @ side_by_side(weights.up), biases_H.up)
  gate_TH, up_TH = checkpoint_name((gate_TH, up_TH), EXPERTS)
  combine_TE = combine.astype(x.dtype)
  # Weighing the hidden layer instead of the output lets one product sum over experts.
  hidden_TEF = activation(gate_TH, up_TH).reshape(-1, num_experts, d_ff) * combine_TE[..., None]
  y_TD = hidden_TEF.reshape(-1, num_experts * d_ff) @ weights.down.reshape(-1, d_model)
  if weights.biases.down is None:
    return y_TD
  return y_TD + combine_TE @ weights.biases.down


def side_by_side(w_EDF: Array) -> Array:
  """Returns the matrices of all experts as one, expert after expert. [E, D, F] -> [D, H]."""
  return w_EDF.swapaxes(0, 1).reshape(w_EDF.shape[1], -1)


def batched_ffn(x: Array, weights: Weights, activation: Activation) -> Array:
  """Returns each expert's outputs on its own buffer of rows. [E, C, D] -> [E, C, D].

  With biases, rows of zeros do not give zeros.
  """
  biases = jax.tree.map(lambda bias: bias[:, None], weights.biases)
  gate_ECF = add_bias(jnp.einsum('ecd,edf->ecf', x, weights.gate), biases.gate)
  up_ECF = add_bias(jnp.einsum('ecd,edf->ecf', x, weights.up), biases.up)
  gate_ECF, up_ECF = checkpoint_name((gate_ECF, up_ECF), EXPERTS)
  hidden_ECF = activation(gate_ECF, up_ECF)
  return add_bias(jnp.einsum('ecf,efd->ecd', hidden_ECF, weights.down), biases.down)
