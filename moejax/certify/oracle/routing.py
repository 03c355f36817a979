"""What the equations of routing say, in slow float64 NumPy.

Written from the formulas, never from moejax. Loops over tokens and experts stand where the equation
has a sum; nothing here is meant to be fast. An equation number is cited only where the paper was
read; what is derived says so.

Letters: B batch, S sequence, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


def finite_difference(f: Callable[[F64], float], x: ArrayLike, eps: float = 1e-5) -> F64:
  """Gradient of a scalar function by central differences, of the shape of x.

  The error is O(eps²), plus rounding of O(1e-16 / eps).
  """
  x = np.array(x, np.float64)
  gradient = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    centre = x[i]
    x[i] = centre + eps
    above = f(x.copy())
    x[i] = centre - eps
    below = f(x.copy())
    x[i] = centre
    gradient[i] = (above - below) / (2 * eps)
  return gradient


def slope(f: Callable[[F64], float], x: ArrayLike, direction: F64, eps: float = 1e-5) -> float:
  """Derivative of f at x along a direction; a gradient wrong anywhere fails along a random one."""
  x = np.asarray(x, np.float64)
  return (f(x + eps * direction) - f(x - eps * direction)) / (2 * eps)


def logsumexp(z: F64) -> float:
  """log Σ exp z, of one token [E]."""
  top = float(np.max(z))  # exp of what is left cannot overflow
  return top + math.log(math.fsum(math.exp(v - top) for v in z))


def log_sigmoid(z: F64) -> F64:
  """log 1/(1 + exp(-z)), entry by entry."""
  # Two forms of the same number, each where its exp cannot overflow.
  return np.array([-math.log1p(math.exp(-v)) if v >= 0 else v - math.log1p(math.exp(v)) for v in z])


def softmax(z: F64) -> F64:
  """exp z / Σ exp z, of one token [E]."""
  return np.exp(z - logsumexp(z))


def sigmoid(z: F64) -> F64:
  """1/(1 + exp(-z)), entry by entry."""
  return np.exp(log_sigmoid(z))


def log_sqrt_softplus(z: F64) -> F64:
  """log sqrt(log(1 + exp z)), entry by entry.

  log(1 + x) is x to float64 where x = exp z is below exp(-37).
  """
  return np.array(
    [v / 2 if v < -37 else math.log(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) / 2 for v in z]
  )


SCORES: dict[str, Callable[[F64], F64]] = {
  'softmax': softmax,
  'sigmoid': sigmoid,
  'sqrt_softplus': lambda z: np.exp(log_sqrt_softplus(z)),
}
LOG_SCORES: dict[str, Callable[[F64], F64]] = {
  'softmax': lambda z: z - logsumexp(z),
  'sigmoid': log_sigmoid,
  'sqrt_softplus': log_sqrt_softplus,
}


def scores(logits: ArrayLike, score_fn: str) -> F64:
  """s_te over all E experts, before any choice. Logits [..., E] -> [..., E]."""
  return np.apply_along_axis(SCORES[score_fn], -1, np.asarray(logits, np.float64))


def probabilities(logits: ArrayLike, score_fn: str) -> F64:
  """p_te = s_te / Σ_e' s_te' over all E experts (DeepSeek-V3 eq. 17-20 for sigmoid). [..., E].

  Written as exp(log s - log Σ s), so that a row of scores that all underflow still sums to 1.
  """

  def one(z: F64) -> F64:
    log_s = LOG_SCORES[score_fn](z)
    return np.exp(log_s - logsumexp(log_s))

  return np.apply_along_axis(one, -1, np.asarray(logits, np.float64))


class Routing(NamedTuple):
  """What a router decided, of a batch of tokens."""

  logits: F64  # [B, S, E]
  scores: F64  # [B, S, E]
  expert_ids: I64  # [B, S, K]
  weights: F64  # [B, S, K]


def best(values: ArrayLike, k: int) -> list[int]:
  """Indices of the k largest values, largest first, ties to the lowest index."""
  values = [float(v) for v in np.asarray(values)]
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def choose(choice: F64, top_k: int, num_groups: int, top_groups: int) -> list[int]:
  """The K experts of one token, of the groups whose two best have the largest sum.

  choice = s + b [E]. All groups are equally large, of neighbouring experts.
  """
  size = len(choice) // num_groups
  worth = [
    sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)
  ]
  kept = best(worth, top_groups)
  allowed = [choice[e] if e // size in kept else -math.inf for e in range(len(choice))]
  return best(allowed, top_k)


def weigh(
  logits: ArrayLike,
  expert_ids: ArrayLike,
  score_fn: str,
  renormalise: bool = True,
  scale: float = 1.0,
) -> F64:
  """Weights of the experts chosen [..., K], from s without the bias.

  1e-20 guards a sum of zeros.
  """
  s, expert_ids = scores(logits, score_fn), np.asarray(expert_ids)
  weights = np.zeros(expert_ids.shape)
  for t in np.ndindex(expert_ids.shape[:-1]):
    w = np.array([s[t][e] for e in expert_ids[t]])
    weights[t] = scale * (w / (w.sum() + 1e-20) if renormalise else w)
  return weights


def route(
  logits: ArrayLike,
  bias: ArrayLike,
  *,
  top_k: int,
  score_fn: str,
  num_groups: int = 1,
  top_groups: int = 1,
  renormalise: bool = True,
  scale: float = 1.0,
) -> Routing:
  """The routing of a batch: chooses with s + b, weighs with s. Logits [B, S, E], bias [E]."""
  logits, bias = np.asarray(logits, np.float64), np.asarray(bias, np.float64)
  s = scores(logits, score_fn)
  expert_ids = np.zeros((*s.shape[:-1], top_k), np.int64)
  for t in np.ndindex(s.shape[:-1]):
    expert_ids[t] = choose(s[t] + bias, top_k, num_groups, top_groups)
  return Routing(logits, s, expert_ids, weigh(logits, expert_ids, score_fn, renormalise, scale))
