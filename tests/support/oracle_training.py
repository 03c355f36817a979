"""What the equations of the cross entropy and of AdamW say, in slow float64 NumPy."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.optimizer import AdamW, adamw_step, no_moments
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


def adamw(
  params: dict[str, F64],
  steps: Sequence[dict[str, F64]],
  *,
  rates: Sequence[float],
  rule: AdamW,
) -> dict[str, F64]:
  """Parameters after one AdamW step for each dict of gradients."""
  moments = no_moments(params)
  for gradients, rate in zip(steps, rates, strict=True):
    params, moments = adamw_step(params, moments, gradients, rate=rate, rule=rule)
  return params
