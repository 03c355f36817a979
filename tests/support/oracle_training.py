"""What the equations of the cross entropy and of AdamW say, in slow float64 NumPy."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64, logsumexp

IGNORE = -100  # a target that counts nowhere


def cross_entropy(
  logits: ArrayLike, targets: ArrayLike, z_coefficient: float = 0.0
) -> tuple[float, float, int]:
  """(Σ (logsumexp - target's logit), Σ z_coefficient logsumexp², tokens) over targets that count.

  logits [B, S, V], targets [B, S].
  """
  logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
  nll, z = [], []
  for t in np.ndindex(targets.shape):
    if targets[t] != IGNORE:
      norm = logsumexp(logits[t])
      nll.append(norm - logits[t][targets[t]])
      z.append(z_coefficient * norm**2)
  return math.fsum(nll), math.fsum(z), len(nll)


# The optimiser: parameters and gradients are dicts of arrays.


def global_norm(gradients: dict[str, F64]) -> float:
  """The norm of all gradients as one vector."""
  return math.sqrt(
    math.fsum(float((np.asarray(g, np.float64) ** 2).sum()) for g in gradients.values())
  )


def adamw(
  params: dict[str, F64],
  steps: Sequence[dict[str, F64]],
  *,
  rates: Sequence[float],
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  decay: dict[str, bool],
  clip: float,
) -> dict[str, F64]:
  """Parameters after one AdamW step for each dict of gradients.

  Clip to global norm (0 = off), then bias-corrected moments, eps outside the square root; decay is
  decoupled, times the rate, and only where `decay` says so.
  """
  p = {k: np.array(v, np.float64) for k, v in params.items()}
  m, v = ({k: np.zeros_like(a) for k, a in p.items()} for _ in range(2))
  for n, (gradients, rate) in enumerate(zip(steps, rates, strict=True), start=1):
    norm = global_norm(gradients)
    shrink = clip / norm if 0 < clip < norm else 1.0
    for k in p:
      g = shrink * np.asarray(gradients[k], np.float64)
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g**2
      update = (m[k] / (1 - b1**n)) / (np.sqrt(v[k] / (1 - b2**n)) + eps)
      p[k] = p[k] - rate * (update + (weight_decay * p[k] if decay[k] else 0.0))
  return p
