"""Is training stable? Spikes of loss and gradient norm, and how much the loss fluctuates.

Both are measured from a trend, a moving average. Its state is part of TrainState, so that a resumed
run says what an uninterrupted one would have said.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Ours, and no paper's. Averages reach back over 1 / RATE steps, and mean nothing of fewer.
RATE, SIGMAS = 0.05, 4.0  # Gaussian noise alone makes a spike in one of 5000 steps
LARGEST = 1e15  # a distance from the trend is cut to this: its square is finite in float32


class Stability(NamedTuple):
  """Moving averages, f32. Entries [2]: loss, gradient norm.

  Field names are paths in checkpoints.
  """

  steps: Array  # scalar, taken in: skipped ones are not
  trend: Array  # [2], average of the values
  # [2], average of value - trend before it: below 0 while the loss falls, for an average lags.
  gap: Array
  square: Array  # [2], average of (value - trend before it)^2
  spikes: Array  # [2], so far


def init_stability() -> Stability:
  """The state before the first step."""
  return Stability(
    steps=jnp.zeros(()),
    trend=jnp.zeros(2),
    gap=jnp.zeros(2),
    square=jnp.zeros(2),
    spikes=jnp.zeros(2),
  )


def spike_limit(state: Stability, sigmas: float) -> Array:
  """The values above which a spike begins, [2]; inf while there are too few steps to say.

  It is trend + gap + sigmas * std of the steps so far, with std^2 = square - gap^2.
  """
  # Rounding can take the difference of the two below 0.
  std = jnp.sqrt(jnp.maximum(state.square - state.gap**2, 0))
  return jnp.where(state.steps >= 1 / RATE, state.trend + state.gap + sigmas * std, jnp.inf)


def update_stability(
  state: Stability, loss: Array, grad_norm: Array, skipped: Array
) -> tuple[Stability, dict[str, Array]]:
  """Takes one step in: the averages after it, and what is logged of it.

  A skipped step, or one that is not finite, changes nothing: a NaN would never leave an average.

  Args:
    state: the averages before the step.
    loss, grad_norm: scalars, its values.
    skipped: scalar bool.

  Returns:
    The new state, and scalars by name. NAME is loss and grad_norm.
    NAME_spike: 1 above `spike_limit`; NAME_spikes: how many so far.
    stability: std of the loss, which a stable run has below 0.1.
    loss_trend: the trend of the loss.
  """
  values, limit = jnp.stack([loss, grad_norm]), spike_limit(state, SIGMAS)
  good = ~jnp.asarray(skipped, bool) & jnp.isfinite(values).all()
  spike = (good & (values > limit)).astype(jnp.float32)
  # A spike is averaged in only up to the limit, or it would hide the next; so the limit rises, and
  # a level that stays gets in. At a std of 0 it gets in by the small share of the trend.
  most = limit + 1e-6 * jnp.abs(state.trend)
  gap = jnp.clip(jnp.minimum(values, most) - state.trend, -LARGEST, LARGEST)

  def moving_average(old: Array, new: Array, count: Array) -> Array:
    # Of few values it is their plain mean: the rate is 1 / count until that is below RATE.
    return old + jnp.maximum(RATE, 1 / jnp.maximum(count, 1)) * (new - old)

  # 0 at the first step: there is no trend yet to be away from.
  new_gap = jnp.where(state.steps == 0, 0, moving_average(state.gap, gap, state.steps))
  new_square = jnp.where(state.steps == 0, 0, moving_average(state.square, gap**2, state.steps))
  trend = moving_average(state.trend, state.trend + gap, state.steps + 1)
  taken_in = Stability(state.steps + 1, trend, new_gap, new_square, state.spikes + spike)
  new = jax.tree.map(lambda old, new: jnp.where(good, new, old), state, taken_in)
  return new, {
    'stability': jnp.sqrt(jnp.maximum(new.square - new.gap**2, 0))[0],
    'loss_trend': new.trend[0],
    'loss_spike': spike[0],
    'loss_spikes': new.spikes[0],
    'grad_norm_spike': spike[1],
    'grad_norm_spikes': new.spikes[1],
  }
