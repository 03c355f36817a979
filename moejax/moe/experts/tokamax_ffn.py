"""The grouped FFN by tokamax's grouped products, where that package is installed.

tokamax has kernels for TPUs and NVIDIA GPUs and chooses among them by the device at hand. Their
products are those of `jax.lax.ragged_dot`, so all around them is `ragged_dot_ffn`.

Letters: T tokens, D model.
"""

import importlib.util

from absl import flags
from jax import Array

from moejax.moe.experts.ragged_dot_ffn import Products, ragged_backward, ragged_forward
from moejax.moe.experts.residuals import FfnGradients, PreActivations, Residuals
from moejax.moe.experts.sorted_copies import Copies
from moejax.moe.experts.weights import Activation, Weights


def has_tokamax() -> bool:
  """Whether the package is installed; it is not imported."""
  return importlib.util.find_spec('tokamax') is not None


def tokamax_products() -> Products:
  """Returns tokamax's products."""
  import tokamax  # half a second, of those who ask for it

  # Its options are flags of absl, which it would else look for in our own command line.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return Products(tokamax.ragged_dot, tokamax.ragged_dot_general)


def tokamax_forward(
  x_TD: Array, copies: Copies, weights: Weights, activation: Activation, even_share: int = 0
) -> tuple[Array, PreActivations]:
  """Returns what `ragged_forward` does."""
  products = tokamax_products()
  return ragged_forward(x_TD, copies, weights, activation, even_share, products=products)


def tokamax_backward(
  residuals: Residuals, activation: Activation, dy_TD: Array, even_share: int = 0
) -> FfnGradients:
  """Returns what `ragged_backward` does."""
  return ragged_backward(residuals, activation, dy_TD, even_share, products=tokamax_products())
