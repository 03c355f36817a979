"""The dropless expert FFN, fused, with its gradient by hand.

  y[t] = sum over the copies of t of weight * expert(x_t)

One signature, one implementation a platform:

- CPU: `blocked`, a loop over experts and their blocks of rows. `jax.lax.ragged_dot` is a dense
  product over all experts there and on GPUs: E times the work.
- NVIDIA GPUs: `triton`, kernels of our own; where the GPU or this JAX lacks what they need,
  `blocked`, and a warning that says so.
- TPU: `ragged_dot`, a real grouped-matmul kernel.
- `tokamax`, where that package is installed and a config asks for it: its own kernels for both.
- Instead of `blocked`, which reads every expert, `gathered` for half as many copies as experts, or
  fewer: decoding.

The gradient keeps the two pre-activations.

Letters: T tokens, D model, F FFN hidden, E experts, N = T * K copies.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.config import not_one_of
from moejax.moe.experts.blocked_ffn import blocked_backward, blocked_forward
from moejax.moe.experts.gathered_ffn import gathered_backward, gathered_forward
from moejax.moe.experts.ragged_dot_ffn import ragged_backward, ragged_forward
from moejax.moe.experts.residuals import Backward, Forward, Residuals
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.tokamax_ffn import has_tokamax, tokamax_backward, tokamax_forward
from moejax.moe.experts.triton.support import is_usable
from moejax.moe.experts.triton_ffn import triton_backward, triton_forward
from moejax.moe.experts.weights import Activation, Weights
from moejax.moe.saved_names import EXPERTS
from moejax.sharding.logical_axes import platform

AUTO = 'auto'


class Implementation(NamedTuple):
  """One way to compute the grouped FFN; all give the same sums but for their rounding."""

  forward: Forward
  backward: Backward


# The activation is a Python function, `even_share` a size: static for differentiation.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_ffn(
  x: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  even_share: int = 0,
  implementation: str = AUTO,
) -> Array:
  """Returns the weighted sum of its experts' outputs for every token.

  Args:
    x: [T, D] in the compute dtype.
    copies: sorted by expert, see `sort_copies`.
    weights: the experts' projections in the compute dtype.
    activation: of the gate and the up projection.
    even_share: copies that these experts get of an even routing, where there is room for more, in
      an expert-parallel group; 0: as many as there are.
    implementation: a row of IMPLEMENTATIONS, or 'auto' for the best one here.

  Returns:
    [T, D] in the dtype of x. Sums over a token's copies and over blocks are in that dtype.
  """
  forward, _ = chosen(implementation, copies)
  return forward(x, copies, weights, activation, even_share)[0]


def grouped_ffn_fwd(
  x: Array,
  copies: Copies,
  weights: Weights,
  activation: Activation,
  even_share: int,
  implementation: str,
) -> tuple[Array, Residuals]:
  """Computes the forward pass for differentiation, which keeps the pre-activations."""
  forward, _ = chosen(implementation, copies)
  y, pre_activations = forward(x, copies, weights, activation, even_share)
  # Named here, where they are made: a remat policy that keeps them runs no product again.
  return y, Residuals(x, copies, weights, checkpoint_name(pre_activations, EXPERTS))


def grouped_ffn_bwd(
  activation: Activation, even_share: int, implementation: str, residuals: Residuals, dy: Array
) -> tuple[Array, Copies, Weights]:
  """Returns cotangents of x, of the copies' weights and of the experts' projections."""
  _, backward = chosen(implementation, residuals.copies)
  gradients = backward(residuals, activation, dy, even_share)
  # None is JAX's cotangent of integers: of the copies' tokens and of the load.
  d_copies = Copies(tokens=None, weights=gradients.copy_weights, load=None)
  return gradients.x, d_copies, gradients.weights


grouped_ffn.defvjp(grouped_ffn_fwd, grouped_ffn_bwd)


def chosen(implementation: str, copies: Copies) -> Implementation:
  """Returns a row of IMPLEMENTATIONS; of 'auto' the best one for these copies."""
  name = best_implementation(copies) if implementation == AUTO else implementation
  return IMPLEMENTATIONS[name]


def best_implementation(copies: Copies) -> str:
  """Returns the row of IMPLEMENTATIONS for so many copies on the traced program's platform.

  On CPU a gathered expert costs half of one that is sliced out of the stack, until the gathered
  ones outgrow a cache.
  """
  name = BEST_BY_PLATFORM[platform()]
  if name == 'triton' and not is_usable():
    name = 'blocked'
  is_small = 2 * copies.tokens.size <= copies.load.size
  return 'gathered' if name == 'blocked' and is_small else name


IMPLEMENTATIONS: dict[str, Implementation] = {
  'blocked': Implementation(blocked_forward, blocked_backward),
  'gathered': Implementation(gathered_forward, gathered_backward),
  'ragged_dot': Implementation(ragged_forward, ragged_backward),
  'triton': Implementation(triton_forward, triton_backward),
}
if has_tokamax():
  IMPLEMENTATIONS['tokamax'] = Implementation(tokamax_forward, tokamax_backward)


def implementation_problem(name: str) -> str:
  """The problem of a name that is neither 'auto' nor a row of IMPLEMENTATIONS; '' if none."""
  if name == 'tokamax' and not has_tokamax():
    return "implementation='tokamax' needs the package: pip install tokamax"
  return not_one_of('implementation', name, (AUTO, *IMPLEMENTATIONS))


# A row of IMPLEMENTATIONS by platform; see the top of this file for why.
BEST_BY_PLATFORM = {'cpu': 'blocked', 'gpu': 'triton', 'tpu': 'ragged_dot'}
