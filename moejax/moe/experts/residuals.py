"""What the grouped FFN's forward pass keeps for the backward pass, and what that one gives.

Letters: T tokens, D model, F FFN hidden, E experts, N copies.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.weights import Activation, Weights


class PreActivations(NamedTuple):
  """What the activation is applied to, a row for each sorted copy.

  Rows past the last assigned copy hold no meaning. An implementation may keep more than N rows, or
  none and compute them again.
  """

  gate: Array  # [N or more, F]  gate x
  up: Array  # [N or more, F]  up x


class Residuals(NamedTuple):
  """What the backward pass needs: the arguments of the forward pass, and its pre-activations."""

  x: Array  # [T, D]
  copies: Copies
  weights: Weights
  pre_activations: PreActivations


class FfnGradients(NamedTuple):
  """Cotangents of the forward pass's arguments; the integers in its copies have none."""

  x: Array  # [T, D]
  copy_weights: Array  # [N] f32
  weights: Weights


# (x, copies, weights, activation, even_share) -> y [T, D], pre-activations
Forward = Callable[[Array, Copies, Weights, Activation, int], tuple[Array, PreActivations]]
# (residuals, activation, dy [T, D], even_share) -> gradients
Backward = Callable[[Residuals, Activation, Array, int], FfnGradients]
