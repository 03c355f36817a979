"""Holds a gradient of routing against the slope of a function of the oracle."""

from collections.abc import Callable

import numpy as np
from jax import Array


def check_slopes(
  gradient: Array, f: Callable[[np.ndarray], np.ndarray], logits: np.ndarray
) -> None:
  """Holds a gradient [..., E] against the slope of the oracle's f: [..., E] -> [..., n].

  A token's outputs depend on its own logits alone, so two evaluations give the slope of every token
  at once, each along its own direction.
  """
  direction = np.random.default_rng(3).normal(size=logits.shape)
  above, below = (f(logits + h * direction).sum(-1) for h in (1e-5, -1e-5))
  np.testing.assert_allclose(
    (np.asarray(gradient, np.float64) * direction).sum(-1),
    (above - below) / 2e-5,
    rtol=2e-5,
    atol=2e-6,
  )
