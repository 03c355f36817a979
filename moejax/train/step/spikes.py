"""Is training stable: spikes of the loss and of the gradient norm, and how much the loss fluctuates about its trend.

Its state is part of TrainState, so that a resumed run says what an uninterrupted one would have said.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Ours, and no paper's. Averages reach back over 1 / RATE steps, and mean nothing of fewer.
RATE, SIGMAS = 0.05, 4.0  # Gaussian noise alone makes a spike in one of 5000 steps
LARGEST = 1e15  # a distance from the trend is cut to this: its square is finite in float32


class Stability(NamedTuple):
  """Moving averages, f32. Entries [2]: loss, gradient norm."""

  steps: Array  # scalar, taken in: skipped ones are not
  trend: Array  # [2], average of the values
  gap: Array  # [2], average of value - trend before it: below 0 while the loss falls, for an average lags
  square: Array  # [2], average of (value - trend before it)^2
  spikes: Array  # [2], so far


def init_stability() -> Stability:
  """Nothing seen."""
  return Stability(jnp.zeros(()), *(jnp.zeros(2) for _ in range(4)))


def spike_limit(state: Stability, sigmas: float) -> Array:
  """Where a spike begins, [2]: trend + gap + sigmas * std of the steps so far, std^2 = square - gap^2; inf of few."""
  std = jnp.sqrt(jnp.maximum(state.square - state.gap**2, 0))
  return jnp.where(state.steps >= 1 / RATE, state.trend + state.gap + sigmas * std, jnp.inf)


def update_stability(
  state: Stability, loss: Array, grad_norm: Array, skipped: Array
) -> tuple[Stability, dict[str, Array]]:
  """One step taken in; scalars. A skipped step, or one that is not finite, changes nothing: a NaN would never leave.

  loss_spike, grad_norm_spike: 1 above the `limit`; NAME_spikes, how many so far. A spike is averaged in only up to
    there, or it would hide the next; so the limit rises, and a level that stays gets in.
  stability: std of the loss, which a stable run has below 0.1.  loss_trend: its trend.
  """
  values, edge = jnp.stack([loss, grad_norm]), spike_limit(state, SIGMAS)
  good = ~jnp.asarray(skipped, bool) & jnp.isfinite(values).all()
  spike = (good & (values > edge)).astype(jnp.float32)
  most = edge + 1e-6 * jnp.abs(state.trend)  # at a std of 0 a new level still gets in
  gap = jnp.clip(jnp.minimum(values, most) - state.trend, -LARGEST, LARGEST)

  def averaged(old: Array, new: Array, count: Array) -> Array:
    return old + jnp.maximum(RATE, 1 / jnp.maximum(count, 1)) * (
      new - old
    )  # of few values the plain mean

  moved = [
    jnp.where(
      state.steps == 0, 0, averaged(old, new, state.steps)
    )  # 0: no trend yet to be away from
    for old, new in ((state.gap, gap), (state.square, gap**2))
  ]
  trend = averaged(state.trend, state.trend + gap, state.steps + 1)
  taken_in = Stability(state.steps + 1, trend, *moved, state.spikes + spike)
  new = jax.tree.map(lambda old, new: jnp.where(good, new, old), state, taken_in)
  return new, {
    'stability': jnp.sqrt(jnp.maximum(new.square - new.gap**2, 0))[0],
    'loss_trend': new.trend[0],
    'loss_spike': spike[0],
    'loss_spikes': new.spikes[0],
    'grad_norm_spike': spike[1],
    'grad_norm_spikes': new.spikes[1],
  }
