"""What the equations of the loss-free bias rules say, in slow float64 NumPy.

Written from the formulas, never from moejax. A rule sees one step's whole batch: b, m, c [E], bias,
momentum and counts; c̄ = T K / E is the mean count, u the rate.

Letters: B batch, S sequence, E experts, K experts per token, T tokens that count.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64


class BiasState(NamedTuple):
  """What a rule keeps; the momentum is 0 for all rules but SMEBU."""

  bias: F64  # [E]
  momentum: F64  # [E]


class Seen(NamedTuple):
  """The whole batch of one step: scores s as the router had them, its choice, and what counts."""

  scores: ArrayLike  # [B, S, E]
  expert_ids: ArrayLike  # [B, S, K]
  mask: ArrayLike  # [B, S]


def mean(values: ArrayLike) -> float:
  """Σ v / E."""
  values = np.asarray(values, np.float64)
  return math.fsum(values) / len(values)


def sign_rule(state: BiasState, counts: F64, rate: float) -> BiasState:
  """b += u sign(c̄ - c): 2408.15664 Alg. 1."""
  # c̄ - c, times E: of whole numbers the sign is exact.
  steps = [np.sign(counts.sum() - len(counts) * c) for c in counts]
  return state._replace(bias=state.bias + rate * np.array(steps))


def proportional_rule(state: BiasState, counts: F64, rate: float) -> BiasState:
  """b += u (1 - c / c̄)."""
  return state._replace(bias=state.bias + rate * np.array([1 - c / mean(counts) for c in counts]))


def centred_sign_rule(state: BiasState, counts: F64, rate: float) -> BiasState:
  """b += u (sign(c̄ - c) - its mean over experts)."""
  steps = [float(np.sign(counts.sum() - len(counts) * c)) for c in counts]
  return state._replace(bias=state.bias + rate * np.array([step - mean(steps) for step in steps]))


def smebu_rule(
  state: BiasState, counts: F64, rate: float, kappa: float = 2.0, beta: float = 0.5
) -> BiasState:
  """v = (c̄ - c)/c̄; d = u tanh(κ v); d -= mean d; m = β m + (1 - β) d; b += m.

  After 2602.17004, read second-hand.
  """
  d = [rate * math.tanh(kappa * (mean(counts) - c) / mean(counts)) for c in counts]
  m = np.zeros(len(d))
  for e in range(len(d)):
    m[e] = beta * state.momentum[e] + (1 - beta) * (d[e] - mean(d))
  return BiasState(state.bias + m, m)


def above_the_line(bias: ArrayLike, seen: Seen) -> F64:
  """x_te = s_te + b_e - a_t of the tokens that count, [T, E].

  a_t is the (K+1)-th largest of s_t + b. Derived for routers that leave experts out (groups,
  dropout), the same where none are: a_t is the largest of those not chosen that are no larger than
  every chosen one, and who was not chosen though larger is at the line, x = 0. s + b and x are
  rounded to float32, as a router has them: which bin a number is in must not hang on that.
  """
  rows = []
  scores, bias = np.asarray(seen.scores, np.float32), np.asarray(bias, np.float32)
  for t in np.ndindex(np.asarray(seen.mask).shape):
    if np.asarray(seen.mask)[t]:
      choice, chosen = scores[t] + bias, {int(e) for e in np.asarray(seen.expert_ids)[t]}
      least = min((choice[e] for e in chosen if e < len(bias)), default=np.float32(np.inf))
      others = [e for e in range(len(bias)) if e not in chosen]
      a = max(choice[e] for e in others if choice[e] <= least)
      row = [choice[e] - a if e in chosen or choice[e] <= a else 0.0 for e in range(len(bias))]
      rows.append(row)
  return np.array(rows, np.float64).reshape(-1, len(bias))


def exact_quantile(x: ArrayLike, top_k: int, num_experts: int) -> float:
  """The number that K/E of x lie above.

  The middle of two neighbours where any number between them would do.
  """
  x, need = sorted(np.asarray(x, np.float64)), Fraction(len(x) * (num_experts - top_k), num_experts)
  low = next(v for i, v in enumerate(x) if i + 1 >= need)
  high = next(v for i, v in enumerate(x) if i + 1 > need)
  return float((low + high) / 2)


def bin_around(v: float, finest: float = 2.0**-24, largest: float = 2.0**8) -> tuple[float, float]:
  """The ends of the bin that holds v: |v| + finest lies between neighbouring quarters of an octave.

  The middle bin holds both signs. What lies at `largest` or beyond is in the last quarter below it,
  or, if negative, in the first above it.
  """
  size = float(np.float32(abs(v)) + np.float32(finest))
  size = min(size, largest if v < 0 else largest * (1 - 1e-9))
  octave = 2.0 ** (math.frexp(size)[1] - 1)
  low = octave * (1 + math.floor(4 * (size / octave - 1)) / 4)
  low, high = low - finest, low + octave / 4 - finest
  if low == 0:
    return -high, high
  return (low, high) if v > 0 else (-high, -low)


def binned_quantile(x: ArrayLike, top_k: int, num_experts: int) -> float:
  """The quantile of numbers of which only the bins are known, and that lie evenly in each."""
  x = np.asarray(x, np.float64)
  bins, need = [bin_around(v) for v in x], Fraction(len(x) * (num_experts - top_k), num_experts)
  found, before = [], 0
  for low, high in sorted(set(bins)):
    inside = bins.count((low, high))
    place = low + float((need - before) / inside) * (high - low)
    found += [place] * ((before < need <= before + inside) + (before <= need < before + inside))
    before += inside
  return math.fsum(found) / len(found)


def quantile_rule(
  state: BiasState,
  seen: Seen,
  rate: float,
  quantile: Callable[[ArrayLike, int, int], float] = binned_quantile,
) -> BiasState:
  """b_e = -quantile_{1-K/E} over t of (s_te - a_t), minus the mean over experts.

  kexue.fm 11619; Kimi K3. With x_te = s_te + b_e - a_t: b_e -= quantile of x_e, which is the same,
  and all that histograms of x can tell.
  """
  top_k, num_experts = np.asarray(seen.expert_ids).shape[-1], len(state.bias)
  x = above_the_line(state.bias, seen)
  bias = np.zeros(num_experts)
  for e in range(num_experts):
    bias[e] = state.bias[e] - quantile(x[:, e], top_k, num_experts)
  return state._replace(bias=bias - mean(bias))


def of_counts(
  rule: Callable[[BiasState, F64, float], BiasState],
) -> Callable[[BiasState, Seen, float], BiasState]:
  """The rule as a function of the batch, of which it needs c_e alone.

  That is how many tokens that count chose e; id E is unassigned.
  """

  def step(state: BiasState, seen: Seen, rate: float) -> BiasState:
    counts = np.zeros(len(state.bias))
    for t in np.ndindex(np.asarray(seen.mask).shape):
      for e in np.asarray(seen.expert_ids)[t]:
        counts[e : e + 1] += np.asarray(seen.mask)[t]  # an empty slice where unassigned
    return rule(state, counts, rate)

  return step


def bias_step(rule: str, state: BiasState, seen: Seen, rate: float) -> BiasState:
  """One step of a rule. A rate of 0, or no token that counts, holds the state.

  Derived: a schedule must be able to freeze it.
  """
  state = BiasState(*(np.asarray(a, np.float64) for a in state))
  return BIAS_RULES[rule](state, seen, rate) if rate > 0 and np.asarray(seen.mask).any() else state


COUNT_RULES = {
  'sign': sign_rule,
  'proportional': proportional_rule,
  'centred_sign': centred_sign_rule,
  'smebu': smebu_rule,
}
BIAS_RULES = {name: of_counts(rule) for name, rule in COUNT_RULES.items()} | {
  'quantile': quantile_rule
}
