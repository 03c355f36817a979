"""Losses of how much a sum varies between experts."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.certify.batches import B, S
from moejax.moe.balance.importance import variation
from tests.moe.balance.loss_cases import QUICKLY, SIGMOID, Row, balanced, measure


def test_what_varies_not_at_all_costs_nothing() -> None:
  """All experts with the same sums, of tokens that are far from indifferent."""
  logits = np.where(
    np.arange(8) == (np.arange(B)[:, None] * S + np.arange(S))[..., None] % 8, 5, -5
  )
  values = np.asarray(measure(logits.astype(np.float32), *balanced()[1:], SIGMOID)[0])
  # Ties among the other seven go to the lowest: importance is even only to what they weigh.
  assert abs(values[QUICKLY.index(Row('load'))]) < 1e-12
  assert values[QUICKLY.index(Row('importance'))] < 1e-3


def test_variation_is_of_any_scale_and_its_gradient_finite() -> None:
  """Sums of 1e-20, whose squares underflow, are as uneven as sums of 1; nothing at all is even."""
  sums = np.array([[1, 2, 3, 6]], np.float32)
  for scale in (1e-20, 1.0, 1e20):
    np.testing.assert_allclose(variation(scale * sums), [3.5 / 9], rtol=1e-6)
    gradient = jax.grad(lambda sums: variation(sums).sum())(jnp.asarray(scale * sums))
    assert np.isfinite(gradient).all() and np.any(gradient)
  alone = 7 * np.eye(4, dtype=np.float32)[:1]
  np.testing.assert_allclose(variation(alone), [3.0], rtol=1e-6)  # E - 1
  gradient = jax.grad(lambda sums: variation(sums).sum())(jnp.zeros((1, 4)))
  assert variation(np.zeros((1, 4), np.float32))[0] == 0 and not gradient.any()
