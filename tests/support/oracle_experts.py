"""What the equations of experts, dispatch and router statistics say, in slow float64 NumPy.

Letters: B batch, S sequence, D model, F hidden, E experts, K experts per token, T = B*S.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64, Bool, sigmoid

# Weights: gate, up [E, D, F], down [E, F, D], and perhaps biases: gate, up [E, F], down [E, D].


def silu(v: F64) -> F64:
  """v sigmoid(v), entry by entry."""
  return v * sigmoid(v)


def swiglu(
  x: F64,
  gate: F64,
  up: F64,
  down: F64,
  gate_bias: ArrayLike = 0.0,
  up_bias: ArrayLike = 0.0,
  down_bias: ArrayLike = 0.0,
) -> F64:
  """One token x [D] through one expert: down(silu(x gate + b) * (x up + c)) + d."""
  return (silu(x @ gate + gate_bias) * (x @ up + up_bias)) @ down + down_bias


def clamped_swiglu(
  x: F64,
  gate: F64,
  up: F64,
  down: F64,
  gate_bias: ArrayLike = 0.0,
  up_bias: ArrayLike = 0.0,
  down_bias: ArrayLike = 0.0,
  *,
  limit: float,
) -> F64:
  """One token x [D] through an expert of gpt-oss: down((u + 1) g sigmoid(1.702 g)) + d.

  g = min(x gate + b, limit), u = clip(x up + c, -limit, limit).
  """
  g = np.array([min(v, limit) for v in x @ gate + gate_bias])
  u = np.array([min(max(v, -limit), limit) for v in x @ up + up_bias])
  return ((u + 1) * g * sigmoid(1.702 * g)) @ down + down_bias


def capacity_of(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
  """How many copies an expert has room for: ceil(T K / E factor)."""
  return math.ceil(tokens * top_k * Fraction(str(capacity_factor)) / num_experts)


def kept_copies(
  expert_ids: ArrayLike, priority: ArrayLike, num_experts: int, capacity: int, policy: str
) -> Bool:
  """Which copies [T, K] find room: an expert's first ones or its best.

  policy: 'position' for the first ones, by the token's place, so that a later token never evicts an
  earlier one; 'probs' for the best by priority [T, K], of which ties go to the earlier token.
  """
  expert_ids, priority = np.asarray(expert_ids), np.asarray(priority, np.float64)
  kept = np.zeros(expert_ids.shape, bool)
  for e in range(num_experts):
    copies = [(t, k) for t, k in np.ndindex(*expert_ids.shape) if expert_ids[t, k] == e]
    if policy == 'probs':
      copies.sort(key=lambda c: (-priority[c], c))
    else:
      assert policy == 'position', policy
    for copy in copies[:capacity]:
      kept[copy] = True
  return kept


def moe(
  x: ArrayLike,
  expert_ids: ArrayLike,
  weights: ArrayLike,
  experts: Sequence[F64],
  kept: Bool | None = None,
  shared: Sequence[tuple[F64, F64, F64]] = (),
  shared_gate: F64 | None = None,
  ffn: Callable[..., F64] = swiglu,
) -> F64:
  """y_t = Σ_k w_tk FFN_{e_tk}(x_t) over copies kept, weights as they are, + Σ shared FFN(x_t).

  x [T, D] -> [T, D]. The sum of the shared ones, which are SwiGLUs always, is times
  sigmoid(x_t shared_gate) where there is such [D, 1].
  """
  x = np.asarray(x, np.float64)
  expert_ids, weights = np.asarray(expert_ids), np.asarray(weights, np.float64)
  experts = [np.asarray(w, np.float64) for w in experts]
  y = np.zeros_like(x)
  for t in range(len(x)):
    for k, e in enumerate(expert_ids[t]):
      if kept is None or kept[t, k]:
        y[t] += weights[t, k] * ffn(x[t], *(w[e] for w in experts))
    part = 1.0 if shared_gate is None else sigmoid(x[t] @ np.asarray(shared_gate, np.float64))
    for one in shared:
      y[t] += part * swiglu(x[t], *(np.asarray(w, np.float64) for w in one))
  return y


# Router statistics of counts c [E].


def max_vio(counts: ArrayLike) -> float:
  """MaxVio: max_e c_e / c̄ - 1."""
  counts = np.asarray(counts, np.float64)
  return float(counts.max() / counts.mean() - 1)


def expert_usage(counts: ArrayLike) -> float:
  """The part of the experts that any token chose."""
  return sum(1 for c in np.asarray(counts) if c > 0) / len(np.asarray(counts))


def dead_experts(counts: ArrayLike) -> int:
  """How many experts have less than a tenth of an even share."""
  counts = np.asarray(counts, np.float64)
  return sum(1 for c in counts if c / counts.sum() < 0.1 / len(counts))


def load_entropy(counts: ArrayLike) -> float:
  """Entropy of the shares over log E: 1 when even, 0 when one expert has all."""
  counts = np.asarray(counts, np.float64)
  shares = [c / counts.sum() for c in counts]
  return -math.fsum(q * math.log(q) for q in shares if q > 0) / math.log(len(shares))


def balance_score(counts: ArrayLike) -> float:
  """1 - std(c) / c̄, population standard deviation."""
  counts = np.asarray(counts, np.float64)
  return float(1 - counts.std() / counts.mean())


def noise_floor(counts: ArrayLike, top_k: int) -> float:
  """About the MaxVio of a router that chooses at random: sqrt(2 ln E (1 - K/E) / c̄)."""
  counts = np.asarray(counts, np.float64)
  return math.sqrt(2 * math.log(len(counts)) * (1 - top_k / len(counts)) / counts.mean())


def entropy(p: ArrayLike) -> float:
  """-Σ p log p of one distribution [E], in nats."""
  return -math.fsum(q * math.log(q) for q in np.asarray(p, np.float64) if q > 0)


def router_entropies(p: ArrayLike, mask: ArrayLike) -> tuple[float, float]:
  """mean_t H(p_t) and I(expert; token) = H(mean_t p_t) - mean_t H(p_t), over tokens that count.

  p [B, S, E], mask [B, S].
  """
  p, mask = np.asarray(p, np.float64), np.asarray(mask)
  rows = [p[t] for t in np.ndindex(mask.shape) if mask[t]]
  mean = math.fsum(entropy(row) for row in rows) / len(rows)
  return mean, entropy(np.mean(rows, axis=0)) - mean
