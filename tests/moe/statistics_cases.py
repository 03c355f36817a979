"""Loads that the tests of statistics are run on, from collapsed to even."""

import numpy as np

B, S, E, K = 4, 6, 8, 3


# ---- of the load
def loads() -> np.ndarray:  # [L, E]
  rng = np.random.default_rng(0)
  rows = [rng.multinomial(4096, rng.dirichlet(np.full(16, a))) for a in (0.05, 0.3, 1, 10, 1000)]
  return np.array([*rows, np.full(16, 256), np.eye(16)[3] * 4096], np.float32)
