"""Batches and states that the tests of bias rules are run on."""

import functools

import numpy as np

from moejax.moe.bias import BiasState

B, S, E, K = 2, 16, 8, 2


MASK = np.arange(S) < np.array([[13], [16]])


def some_state(num_experts: int, seed: int = 0) -> BiasState:
  rng = np.random.default_rng(num_experts + seed)
  return BiasState(*rng.normal(scale=0.1, size=(2, num_experts)).astype(np.float32))


@functools.cache
def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Batches by what is unusual about them: logits [B, S, E] and mask [B, S]."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(B, S, E)).astype(np.float32)
  single = np.zeros((B, S), bool)
  single[1, 3] = True
  return {
    'plain': (z, np.ones((B, S), bool)),
    'padded': (z, MASK),
    'nothing counts': (z, np.zeros((B, S), bool)),
    'one row counts': (z, np.arange(B)[:, None] * np.ones(S) > 0),
    'single token': (z, single),
    'all alike': (np.zeros_like(z), MASK),
    'two alike': (z[..., [0, 0, 1, 1, 2, 2, 3, 3]], MASK),
    'one crowd': (z + 20 * np.eye(E, dtype=np.float32)[0], MASK),
    'extreme': (1e4 * np.sign(z), MASK),
    'tiny': (1e-3 * z, MASK),
    'never chosen': (z - 30 * np.eye(E, dtype=np.float32)[5], MASK),
  }
