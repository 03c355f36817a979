"""The dropless expert FFN: y[t] = sum over the copies of t of weight * expert(x_t), fused, with its gradient by hand.

One signature, one implementation a platform:
- CPU, and GPU until it has a kernel of its own: `blocked`, a loop over experts and their blocks of rows.
  `jax.lax.ragged_dot` is a dense product over all experts there: E times the work.
- TPU: `ragged_dot`, a real grouped-matmul kernel.
- Instead of `blocked`, which reads every expert, `gathered` for half as many copies as experts, or fewer: decoding.

The gradient keeps the two pre-activations.

Letters: T tokens, D model, F FFN hidden, E experts, N = T * K copies.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array

from moejax.moe.experts.blocked_ffn import blocked_backward, blocked_forward
from moejax.moe.experts.gathered_ffn import gathered_backward, gathered_forward
from moejax.moe.experts.ragged_dot_ffn import ragged_backward, ragged_forward
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.weights import Activation, Weights
from moejax.sharding.logical_axes import platform

Residuals = tuple[
  Array, Copies, Weights, Array, Array
]  # x, copies, weights, gate x, up x: [N or more, F]
Forward = Callable[[Array, Copies, Weights, Activation], tuple[Array, Array, Array]]
Backward = Callable[
  [Array, Copies, Weights, Activation, Array, Array, Array], tuple[Array, Array, Weights]
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_ffn(x: Array, copies: Copies, weights: Weights, activation: Activation) -> Array:
  """The weighted sum of its experts' outputs for every token.

  Args:
    x: [T, D] in the compute dtype.
    copies: sorted by expert, see `sort_copies`.

  Returns:
    [T, D] in the dtype of x. Sums over a token's copies and over blocks are in that dtype.
  """
  return forward(x, copies, weights, activation)[0]


def forward(
  x: Array, copies: Copies, weights: Weights, activation: Activation
) -> tuple[Array, Array, Array]:
  """(y [T, D], gate x, up x [N or more, F]), by the best implementation."""
  return IMPLEMENTATIONS[best_implementation(copies)][0](x, copies, weights, activation)


def grouped_ffn_fwd(
  x: Array, copies: Copies, weights: Weights, activation: Activation
) -> tuple[Array, Residuals]:
  """Forward for differentiation: keeps the pre-activations."""
  y, gates, ups = forward(x, copies, weights, activation)
  return y, (x, copies, weights, gates, ups)


def grouped_ffn_bwd(
  activation: Activation, residuals: Residuals, dy: Array
) -> tuple[Array, Copies, Weights]:
  """Cotangents of x, of the copies' weights (their integers have none) and of the experts' projections."""
  x, copies, weights, gates, ups = residuals
  backward = IMPLEMENTATIONS[best_implementation(copies)][1]
  dx, d_copy_weights, d_weights = backward(x, copies, weights, activation, gates, ups, dy)
  return dx, Copies(None, d_copy_weights, None), d_weights


grouped_ffn.defvjp(grouped_ffn_fwd, grouped_ffn_bwd)


def best_implementation(copies: Copies) -> str:
  """The row of IMPLEMENTATIONS for so many copies on the platform at hand.

  On CPU a gathered expert costs half of one that is sliced where it lies, until what is gathered outgrows a cache.
  """
  name = BEST_BY_PLATFORM[platform()]
  return 'gathered' if name == 'blocked' and 2 * copies.tokens.size <= copies.load.size else name


# name -> (forward, backward)
IMPLEMENTATIONS: dict[str, tuple[Forward, Backward]] = {
  'blocked': (blocked_forward, blocked_backward),
  'gathered': (gathered_forward, gathered_backward),
  'ragged_dot': (ragged_forward, ragged_backward),
}
BEST_BY_PLATFORM = {'cpu': 'blocked', 'gpu': 'blocked', 'tpu': 'ragged_dot'}
