"""Loss-free balance: controllers of the router bias, as init and update like an optax transformation.

  load of the global batch, once an optimiser step -> update -> the bias that the next step's routing adds to its scores

The bias lives in `TrainState.router`: float32, no gradient, no decay, no moments. An update sees the counts of the
whole batch: averaging what shards would each have done gives another rule, and a worse one.

Letters: E experts, L layers (rules see one layer; `jax.vmap` makes it [L, E]).
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp


class BiasRule(NamedTuple):
  """`init(num_experts) -> bias [E]`, `update(bias, load [E], rate) -> bias [E]`."""

  init: Callable[[int], Array]
  update: Callable[[Array, Array, Array], Array]


def zeros(num_experts: int) -> Array:
  """The bias of a router that nobody has pushed yet. [E] f32."""
  return jnp.zeros((num_experts,), jnp.float32)


def sign_update(bias: Array, load: Array, rate: Array) -> Array:
  """`b += rate * sign(mean load - load)` (2408.15664, Algorithm 1; DeepSeek-V3, section 2.1.2, its rate gamma 1e-3).

  Every bias moves by the same step, so `rate` is in units of the score. Counts are compared as whole numbers: a mean
  that rounds would push experts that stand exactly at it.
  """
  return bias + rate * jnp.sign(load.sum() - load.size * load)


def proportional_update(bias: Array, load: Array, rate: Array) -> Array:
  """`b += rate * (1 - load / mean load)`: the error is relative, so `rate` does not depend on the batch size.

  The variant that 2408.15664 compares with the sign rule; softmax scores need it, whose scale varies by token.
  A step that counted no token moves nothing.
  """
  mean = load.mean()
  return bias + rate * jnp.where(mean > 0, 1.0 - load / jnp.maximum(mean, 1.0 / load.size), 0.0)


BIAS_RULES: dict[str, BiasRule] = {
  'sign': BiasRule(zeros, sign_update),
  'proportional': BiasRule(zeros, proportional_update),
}
