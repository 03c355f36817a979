"""What the formulas of selection say, in slow float64 NumPy.

Written from the formulas, never from moejax. Loops over tokens and experts stand where the formula
has a sum or a rank. Unassigned is expert E, one past the last.

Letters: B batch, S sequence, E experts, K experts per token, n tokens of a row that count.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64, I64, LOG_SCORES, Bool, best, logsumexp


def log_scores(logits: ArrayLike, score_fn: str) -> F64:
  """log s_te over all E experts; it orders as s does, and stays finite where s is 0 to float64."""
  return np.apply_along_axis(LOG_SCORES[score_fn], -1, np.asarray(logits, np.float64))


def limited_to_groups(choice: ArrayLike, num_groups: int, top_groups: int, group_best: int) -> F64:
  """One token's choice [E], with -inf outside its best groups.

  Those have the largest sums of their `group_best` best entries. group_best 2 is DeepSeek-V3's
  code, 1 (the largest entry) DeepSeek-V2. Ties go to the lowest group.
  """
  choice = np.asarray(choice, np.float64)
  groups = np.split(choice, num_groups)
  kept = best([math.fsum(sorted(g, reverse=True)[:group_best]) for g in groups], top_groups)
  return np.concatenate(
    [g if i in kept else np.full(len(g), -math.inf) for i, g in enumerate(groups)]
  )


def second_kept(weights: ArrayLike, draws: ArrayLike) -> Bool:
  """Which of two experts are used, [B, S, 2], of weights [B, S, 2] and draws [B, S] from U(0, 1).

  GShard: the second one, of weight g2, where its draw is below 2 g2; the first always.
  """
  weights, draws = np.asarray(weights, np.float64), np.asarray(draws, np.float64)
  kept = np.ones(weights.shape, bool)
  for t in np.ndindex(draws.shape):
    kept[t][1] = draws[t] < 2 * weights[t][1]
  return kept


def normal_cdf(x: float) -> float:
  """P(N(0, 1) < x)."""
  return 0.5 * math.erfc(-x / math.sqrt(2))


def likely(logits: ArrayLike, noisy: ArrayLike, std: ArrayLike, top_k: int) -> F64:
  """P(e) = Phi((z_e - kth_excluding(H, K, e)) / std_e), of noisy logits H = z + N(0, 1) std.

  All [..., E]. Shazeer et al. 2017, noisy top-k gating (from memory, and derived): with the noise
  of the others as it is and its own drawn anew, e is among the K chosen when its H is above the
  K-th largest H of the others.
  """
  logits, noisy, std = (np.asarray(a, np.float64) for a in (logits, noisy, std))
  chance = np.zeros(logits.shape)
  for *t, e in np.ndindex(logits.shape):
    others = sorted((h for i, h in enumerate(noisy[tuple(t)]) if i != e), reverse=True)
    chance[(*t, e)] = normal_cdf((logits[(*t, e)] - others[top_k - 1]) / std[(*t, e)])
  return chance


def top_k_experts(log_s: F64, choice: F64, mask: Bool, ids: I64, top_k: int) -> I64:
  """The K largest of s + b, ties to the lowest index. [B, S, E] -> [B, S, K]."""
  return np.apply_along_axis(lambda c: np.array(best(c, top_k)), -1, choice)


def expert_choice(log_s: F64, choice: F64, mask: Bool, ids: I64, top_k: int) -> I64:
  """Each expert takes ceil(n K / E) tokens of each row, the best by s, ties to the first.

  2202.09368, a row a set. A token's experts [B, S, E] come best first, unassigned last.
  """
  batch, length, num_experts = log_s.shape
  taken = np.full(log_s.shape, num_experts)
  for b in range(batch):
    tokens = [t for t in range(length) if mask[b, t]]
    for e in range(num_experts):
      capacity = math.ceil(len(tokens) * top_k / num_experts)
      for i in best([log_s[b, t, e] for t in tokens], capacity):
        taken[b, tokens[i], e] = e
  for b, t in np.ndindex(batch, length):
    mine = [e for e in taken[b, t] if e < num_experts]
    mine.sort(key=lambda e, s=log_s[b, t]: (-s[e], e))
    taken[b, t] = mine + [num_experts] * (num_experts - len(mine))
  return taken


def sinkhorn_plan(log_s: F64, rounds: int = 8) -> F64:
  """The logarithm of one row's transport plan, [n, E], from log s of its tokens that count [n, E].

  It is scaled `rounds` times: the sums of experts to n / E, then those of tokens to 1.
  """
  plan = np.array(log_s, np.float64)
  n, num_experts = plan.shape
  for _ in range(rounds):
    for e in range(num_experts):
      plan[:, e] += math.log(n / num_experts) - logsumexp(plan[:, e])
    for t in range(n):
      plan[t] -= logsumexp(plan[t])
  return plan


def sinkhorn(log_s: F64, choice: F64, mask: Bool, ids: I64, top_k: int) -> I64:
  """The K largest entries of the plan; else unassigned. [B, S, E] -> [B, S, K]."""
  chosen = np.full((*mask.shape, top_k), log_s.shape[-1])
  for b in range(len(mask)):
    if mask[b].any():
      chosen[b, mask[b]] = [best(row, top_k) for row in sinkhorn_plan(log_s[b, mask[b]])]
  return chosen


def mixed(number: int) -> int:
  """murmur3's finaliser of 32 bits.

  h ^= h >> 16, times 85ebca6b, h ^= h >> 13, times c2b2ae35, h ^= h >> 16.
  """
  h = number % 2**32
  h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
  h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
  return h ^ (h >> 16)


def hashed(log_s: F64, choice: F64, mask: Bool, ids: I64, top_k: int) -> I64:
  """The K experts e with the largest upper 31 bits of mixed(id E + e). ids [B, S] -> [B, S, K]."""
  num_experts = log_s.shape[-1]
  chosen = np.zeros((*ids.shape, top_k), np.int64)
  for t in np.ndindex(ids.shape):
    chosen[t] = best([mixed(int(ids[t]) * num_experts + e) // 2 for e in range(num_experts)], top_k)
  return chosen


def uniform(log_s: F64, choice: F64, mask: Bool, ids: I64, top_k: int) -> I64:
  """Experts in turn: the k-th of the token at place t of its row is (t K + k) mod E. [B, S, K].

  Padding takes no place; its own is that of the token before it.
  """
  chosen = np.zeros((*mask.shape, top_k), np.int64)
  for b, s, k in np.ndindex(chosen.shape):
    t = max(int(mask[b, : s + 1].sum()) - 1, 0)
    chosen[b, s, k] = (t * top_k + k) % log_s.shape[-1]
  return chosen


# name -> (log s [B, S, E], s + b [B, S, E], mask [B, S], token ids [B, S], K) to expert ids.
SELECTIONS: dict[str, Callable[[F64, F64, Bool, I64, int], I64]] = {
  'expert_choice': expert_choice,
  'hash': hashed,
  'sinkhorn': sinkhorn,
  'top_k': top_k_experts,
  'uniform': uniform,
}


def weigh_chosen(
  log_weights: ArrayLike, expert_ids: ArrayLike, renormalise: bool = True, scale: float = 1.0
) -> F64:
  """Weights of a choice [..., K], scale w_e / Σ_chosen w, or scale w_e; unassigned weighs 0.

  log w [..., E] are the logarithms of the scores, or the logits for softmax after top-k. A recorded
  choice is weighed in the same way.
  """
  log_weights, expert_ids = np.asarray(log_weights, np.float64), np.asarray(expert_ids)
  weights = np.zeros(expert_ids.shape)
  for t in np.ndindex(expert_ids.shape[:-1]):
    somebody = [k for k, e in enumerate(expert_ids[t]) if e < log_weights.shape[-1]]
    chosen = np.array([log_weights[t][expert_ids[t][k]] for k in somebody])
    for k, w in zip(somebody, chosen, strict=True):
      weights[t][k] = scale * math.exp(w - logsumexp(chosen) if renormalise else w)
  return weights


def margin(choice: ArrayLike, expert_ids: ArrayLike) -> F64:
  """Least choice taken minus the best not taken, token by token; inf where all or none are taken.

  choice [..., E], expert_ids [..., K] -> [...].
  """
  choice, expert_ids = np.asarray(choice, np.float64), np.asarray(expert_ids)
  gaps = np.zeros(choice.shape[:-1])
  for t in np.ndindex(gaps.shape):
    taken = {int(e) for e in expert_ids[t]} - {choice.shape[-1]}
    ins = [choice[t][e] for e in range(choice.shape[-1]) if e in taken]
    outs = [choice[t][e] for e in range(choice.shape[-1]) if e not in taken]
    gaps[t] = min(ins, default=math.inf) - max(outs, default=-math.inf)
  return gaps
