"""Counts made of a float are those of its decimal, wherever one is made."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.decimals import decimal_of
from moejax.model.rope import RopeConfig, rotated_width
from moejax.moe.selection import num_dropped
from moejax.train.optimizer import OptimConfig, wsd

PERCENTS = range(1, 100)


def test_a_float_is_the_decimal_that_was_written() -> None:
  texts = '1.1', '0.07', '1e-3', '2.827', '1e22', '3', '0.1234567890123'
  assert [decimal_of(float(text)) for text in texts] == [Fraction(text) for text in texts]
  assert decimal_of(np.float64(0.7)) == decimal_of(0.7) == Fraction(7, 10)
  for bad in (math.nan, math.inf):
    with pytest.raises(ValueError):
      decimal_of(bad)


def test_experts_dropped_are_the_nearest_count() -> None:
  for percent in PERCENTS:
    for experts in (8, 60, 100, 200):
      assert num_dropped(percent / 100, experts) == round(Fraction(percent, 100) * experts)
  # A product of floats is 57.49999999999999, and 14.499999999999998 for 0.145.
  assert num_dropped(0.575, 100) == 58 and num_dropped(0.29, 50) == 14


def test_rotated_channels_are_rounded_down_exactly() -> None:
  for percent in PERCENTS:
    width = rotated_width(200, RopeConfig(fraction=percent / 100))
    assert width == 2 * percent, 'int(200 * 0.29) is 57'


def test_the_decay_of_wsd_is_its_part_of_the_steps() -> None:
  """0.035 of 100 steps are 4, a half to even; the product of floats is 3.5000000000000004."""
  for fraction, steps, decay in (
    (0.035, 100, 4),
    (0.575, 100, 58),
    (0.2, 50, 10),
    (0.145, 100, 14),
  ):
    rate = wsd(OptimConfig(learning_rate=1.0, decay_fraction=fraction), steps)
    last_flat, next_step = jnp.int32(steps - decay), jnp.int32(steps - decay + 1)
    assert rate(last_flat) == 1 and rate(next_step) < 1, fraction
