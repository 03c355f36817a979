"""Loss-free balance: controllers of the router bias, as observe and update.

  each micro-batch: routing -> observe -> seen, and all of them add up
  once an optimiser step: state, seen -> update -> the bias that the next routing adds to its scores

The state lives in `TrainState.router`: float32, no gradient, no decay, no moments of the optimiser.
An update sees the whole batch: averaging what shards would each have done gives another rule, and a
worse one.

A rate of 0 and a step that counted no token hold the state as it is, momentum included: a schedule
that ends at 0 freezes the bias. An exactly even load does not push; counts are compared as whole
numbers, since a mean that rounds would push experts that stand exactly at it.

Letters: B batch, S sequence, E experts, K experts per token, L layers (a rule sees one; `jax.vmap`
makes it [L, E]).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.bias_quantile import histogram, quantile
from moejax.moe.routing import Routing
from moejax.moe.token_sets import exact_mean, expert_load, total_of

SHARPNESS = 2.0  # kappa of SMEBU: the tanh bends where a load is off by half of the mean
MEMORY = 0.5  # beta of SMEBU


class BiasState(NamedTuple):
  """What a rule keeps from step to step."""

  bias: Array  # [E] f32  added to the scores to choose, and to nothing else
  momentum: Array  # [E] f32  zeros, except for SMEBU


class BiasRule(NamedTuple):
  """What a rule looks at in a routing, and what it makes of what the whole batch has shown.

  observe: (routing, bias [E], mask [B, S]) -> seen, i32: `load [E]` or a histogram [E, BINS].
    The bias is the one that routed, the same for all micro-batches of a step; what they have seen
    adds up.
  update: (state, seen, rate, K) -> state.
  """

  observe: Callable[[Routing, Array, Array], Array]
  update: Callable[[BiasState, Array, Array, int], BiasState]


def init_bias_state(num_experts: int) -> BiasState:
  """Returns the state before the first step: zeros, [E] each."""
  # Two arrays, not one twice: a step donates the buffers of its state.
  bias, momentum = jnp.zeros((2, num_experts), jnp.float32)
  return BiasState(bias, momentum)


def counts(routing: Routing, bias: Array, mask: Array) -> Array:
  """Returns how many copies went to each expert, of the tokens that count. [E] i32."""
  return expert_load(routing.expert_ids, mask, bias.shape[-1])


def distances(routing: Routing, bias: Array, mask: Array) -> Array:
  """Returns the quantile rule's histogram of the tokens that count. [E, BINS] i32."""
  choice = jax.lax.stop_gradient(routing.scores) + bias
  return histogram(choice, routing.expert_ids, mask)


def shortfall(load: Array) -> Array:
  """`(mean load - load) / mean load`, its sign exact, for counts below 2^31. [E] i32 -> [E] f32.

  A mean that rounds would push experts of an even load.
  """
  mean, experts = exact_mean(load), load.size
  # Whole numbers before float32. Where the difference is too large to be exact there, the rest is
  # too small to turn its sign.
  above = experts * (mean.whole - load).astype(jnp.float32) + mean.rest
  return above / jnp.maximum(total_of(mean, experts), 1.0)


def sign_step(state: BiasState, load: Array, rate: Array, top_k: int) -> BiasState:
  """`b += rate * sign(mean load - load)`.

  2408.15664, Algorithm 1; DeepSeek-V3, section 2.1.2, its rate gamma 1e-3.
  Every bias moves by the same step, so `rate` is in units of the score.
  """
  return state._replace(bias=state.bias + rate * jnp.sign(shortfall(load)))


def proportional_step(state: BiasState, load: Array, rate: Array, top_k: int) -> BiasState:
  """`b += rate * (1 - load / mean load)`.

  The error is relative, so `rate` does not depend on the batch size. The variant that 2408.15664
  compares with the sign rule; softmax scores need it, whose scale varies by token.
  """
  return state._replace(bias=state.bias + rate * shortfall(load))


def centred_sign_step(state: BiasState, load: Array, rate: Array, top_k: int) -> BiasState:
  """The sign step less its mean over experts (torchtitan, Ling).

  The biases keep their mean, and do not drift. A constant in all biases chooses nothing; but
  without this few crowded experts push all others up for ever.
  """
  step = jnp.sign(shortfall(load))
  return state._replace(bias=state.bias + rate * (step - step.mean()))


def smebu_step(state: BiasState, load: Array, rate: Array, top_k: int) -> BiasState:
  """Soft-clamped momentum (SMEBU).

  The sign step made smooth near balance, centred, and averaged over steps. With v the relative
  shortfall, `d = rate * tanh(2 v)` is a proportional step for a load near the mean and a sign step
  far from it, so that `rate` bounds what one step does; d loses its mean as in `centred_sign`; then
  m = m/2 + d/2 and `b += m`. The weights of m sum to 1: under a steady d the bias moves by d a
  step. Derived from a second-hand account of 2602.17004, which was not read: its rate 5e-4, and the
  constants 2 and 1/2.
  """
  step = jnp.tanh(SHARPNESS * shortfall(load))
  momentum = MEMORY * state.momentum + (1.0 - MEMORY) * rate * (step - step.mean())
  return BiasState(state.bias + momentum, momentum)


def quantile_step(state: BiasState, seen: Array, rate: Array, top_k: int) -> BiasState:
  """The bias at which each expert would have had its K/E of the tokens: no rate.

  Kimi K3; kexue.fm/archives/11619.

  A token's experts are those whose s_e + b_e exceeds a, its (K+1)-th largest s + b. Let a stand:
  `b_e` is minus the (1 - K/E)-quantile over tokens of s_e - a; then the mean over experts is taken
  off. That is half of an alternating minimisation of the dual of the assignment problem; the next
  step's a is the other half. Here s_e - a is counted with the old b_e in it, and the quantile is
  what b_e moves by. `rate` above 0 moves, whatever it is, and 0 holds.
  """
  bias = state.bias - quantile(seen, top_k)
  return state._replace(bias=bias - bias.mean())


def unless_idle(
  step: Callable[[BiasState, Array, Array, int], BiasState],
) -> Callable[[BiasState, Array, Array, int], BiasState]:
  """A step that holds its state where the rate is 0 or no token was counted."""

  def update(state: BiasState, seen: Array, rate: Array, top_k: int) -> BiasState:
    moves = (jnp.asarray(rate) > 0) & seen.any()
    moved = step(state, seen, rate, top_k)
    return jax.tree.map(lambda new, old: jnp.where(moves, new, old), moved, state)

  return update


BIAS_RULES: dict[str, BiasRule] = {
  'sign': BiasRule(counts, unless_idle(sign_step)),
  'proportional': BiasRule(counts, unless_idle(proportional_step)),
  'centred_sign': BiasRule(counts, unless_idle(centred_sign_step)),
  'smebu': BiasRule(counts, unless_idle(smebu_step)),
  'quantile': BiasRule(distances, unless_idle(quantile_step)),
}
