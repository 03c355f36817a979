"""What the equations of the balance losses say, in slow float64 NumPy.

Written from the formulas, never from moejax. Loops over tokens and experts stand where the equation
has a sum. An equation number is cited only where the paper was read; what is derived says so. A set
is a number; sets [B, S] holds each token's set, -1 for none.

Letters: B batch, S sequence, D model, E experts, K experts per token, M parts of the experts,
n tokens of a set.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64, I64, Bool, best, logsumexp, probabilities, scores

# Losses that are a mean over sets.
SETS = ('sequence', 'micro_batch', 'ep_group', 'global_batch', 'gshard')


def document_sets(segment_ids: ArrayLike) -> I64:
  """One set a document: the tokens of one row with one segment id > 0. [B, S] -> sets [B, S]."""
  segment_ids = np.asarray(segment_ids)
  sets, number = np.full(segment_ids.shape, -1, np.int64), 0
  for b in range(len(segment_ids)):
    for segment in sorted(set(segment_ids[b].tolist()) - {0}):
      sets[b, segment_ids[b] == segment] = number
      number += 1
  return sets


def row_sets(shape: tuple[int, int], groups: int) -> I64:
  """One set a group of rows, contiguous and equally many; 1 group is the global batch. [B, S]."""
  return np.broadcast_to(np.arange(shape[0])[:, None] // (shape[0] // groups), shape)


def sets_of(
  scope: str, segment_ids: ArrayLike, *, micro_batches: int = 1, ep_groups: int = 1
) -> I64:
  """The set of every token [B, S] under a scope."""
  shape = np.asarray(segment_ids).shape
  groups = {
    'micro_batch': micro_batches,
    'gshard': micro_batches,
    'ep_group': ep_groups,
    'global_batch': 1,
  }
  return document_sets(segment_ids) if scope == 'sequence' else row_sets(shape, groups[scope])


def assignment_of(logits: ArrayLike, expert_ids: ArrayLike, score_fn: str, assignment: str) -> I64:
  """Which experts of each token are counted in f. Logits [B, S, E], expert_ids [B, S, K].

  'dispatched': those that were used. 'unbiased': M° of DeepSeek-V3 eq. 18, the top K of s; it knows
  neither bias nor groups. 'first': only the best of those that were used (GShard).
  """
  expert_ids = np.asarray(expert_ids)
  if assignment == 'dispatched':
    return expert_ids
  if assignment == 'first':
    return expert_ids[..., :1]
  assert assignment == 'unbiased', assignment
  top_k = expert_ids.shape[-1]
  return np.apply_along_axis(lambda s: np.array(best(s, top_k)), -1, scores(logits, score_fn))


def load(expert_ids: ArrayLike, mask: ArrayLike, num_experts: int) -> F64:
  """c_e [E]: how many tokens that count chose expert e; an id of E is unassigned."""
  counted = np.asarray(expert_ids)[np.asarray(mask, bool)]
  counts = np.bincount(counted.ravel(), minlength=num_experts + 1)
  return counts[:num_experts].astype(np.float64)  # the last one is of what is unassigned


def probability_losses(
  p: F64, chosen: I64, mask: ArrayLike, sets: I64, partition: int = 0
) -> list[float]:
  """L_g of every non-empty set g: Σ_e f_e P_e, f_e = E c_e / Σ c, P_e = 1/n Σ_t p_te.

  DeepSeek-V3 eq. 17-20 for a sequence, Qwen 2501.11873 eq. 2-6 for the global batch; other sets by
  analogy. A set has n tokens that count, and of those the counts c. Where every token has K experts
  f_e is their E/(K n) Σ_t M_te; where none has any it is 1 (derived: nothing to say).
  Over M parts of neighbouring experts, L = Σ_m f'_m P'_m: f' the mean of f over a part, P' the sum
  of P (2401.06066).

  p [B, S, E], chosen [B, S, K], mask and sets [B, S]; partition M, 0 for one part an expert.
  """
  mask, num_experts = np.asarray(mask), p.shape[-1]
  size = num_experts // partition if partition else 1
  losses = []
  for g in range(int(sets.max()) + 1):
    here = mask & (sets == g)
    if not here.any():
      continue
    counts = load(chosen, here, num_experts)
    f = num_experts * counts / counts.sum() if counts.any() else np.ones(num_experts)
    mean = p[here].mean(axis=0)
    parts = []
    for m in range(0, num_experts, size):
      parts.append(math.fsum(f[m : m + size]) / size * math.fsum(mean[m : m + size]))
    losses.append(math.fsum(parts))
  return losses


def set_losses(
  logits: ArrayLike,
  expert_ids: ArrayLike,
  mask: ArrayLike,
  sets: I64,
  *,
  score_fn: str,
  assignment: str,
) -> list[float]:
  """L_g of every non-empty set g, from logits."""
  chosen = assignment_of(logits, expert_ids, score_fn, assignment)
  return probability_losses(probabilities(logits, score_fn), chosen, mask, sets)


def mean_over_sets(losses: list[float]) -> float:
  """The plain mean of L_g over the non-empty sets; 0 where no token counts (no paper says)."""
  return math.fsum(losses) / len(losses) if losses else 0.0


def router_z(logits: ArrayLike, mask: ArrayLike) -> float:
  """Mean over the tokens that count of (log Σ_e exp z_te)².

  After ST-MoE, whose text was not read.
  """
  logits, mask = np.asarray(logits, np.float64), np.asarray(mask)
  squares = [logsumexp(logits[t]) ** 2 for t in np.ndindex(mask.shape) if mask[t]]
  return math.fsum(squares) / len(squares) if squares else 0.0


def squared_variation(sums: F64) -> float:
  """CV(x)² = (std x / mean x)², with the population's std; 0 where all are 0."""
  mean = math.fsum(sums) / len(sums)
  return math.fsum((x - mean) ** 2 for x in sums) / len(sums) / mean**2 if mean else 0.0


def summed(values: F64, mask: Bool) -> F64:
  """Σ over the tokens that count. [B, S, E] -> [E]."""
  return np.array([math.fsum(values[mask][:, e]) for e in range(values.shape[-1])])


def importance(weights: F64, expert_ids: I64, mask: Bool, num_experts: int) -> float:
  """CV(Σ_t G_te)², G_te the weight of e where it was chosen: Shazeer et al. 2017, from memory.

  weights and expert_ids [B, S, K].
  """
  gates = np.zeros((*mask.shape, num_experts))
  for t in np.ndindex(mask.shape):
    for e, w in zip(expert_ids[t], weights[t], strict=True):
      if e < num_experts:
        gates[t][e] += w
  return squared_variation(summed(gates, mask))


def smooth_load(likely: F64, mask: Bool) -> float:
  """CV(Σ_t P(e chosen | noise))², likely [B, S, E]: Shazeer et al. 2017, from memory."""
  return squared_variation(summed(likely, mask))


def simbal(router: F64) -> float:
  """‖W Wᵀ - I‖₁, W [E, D] one row an expert, the sum of absolute values (SimBal, 2506.14038).

  router is Wᵀ [D, E].
  """
  w = np.asarray(router, np.float64).T
  return float(np.abs(w @ w.T - np.eye(len(w))).sum())


def loss(
  name: str,
  logits: ArrayLike,
  expert_ids: ArrayLike,
  mask: ArrayLike,
  segment_ids: ArrayLike,
  *,
  score_fn: str,
  assignment: str,
  micro_batches: int = 1,
  ep_groups: int = 1,
) -> float:
  """The loss of this name, without coefficient, on a whole batch."""
  if name == 'router_z':
    return router_z(logits, mask)
  sets = sets_of(name, segment_ids, micro_batches=micro_batches, ep_groups=ep_groups)
  return mean_over_sets(
    set_losses(logits, expert_ids, mask, sets, score_fn=score_fn, assignment=assignment)
  )


def accumulated_balance_loss(
  scope: str,
  logits: ArrayLike,
  expert_ids: ArrayLike,
  mask: ArrayLike,
  segment_ids: ArrayLike,
  *,
  micro_batches: int,
  score_fn: str,
  assignment: str,
) -> float:
  """The loss of a batch of micro-batches, put together from parts that each see one of them only.

  Derived here: for the sequence and micro-batch scopes sums of L_g and of set counts add up. For
  the global batch L is linear in p once the counts c of the whole batch are known:
  E/(K n²) Σ_e c_e Σ_t p_te add up.
  """
  logits, expert_ids, mask, segment_ids = map(np.asarray, (logits, expert_ids, mask, segment_ids))
  rows = np.split(np.arange(len(mask)), micro_batches)
  if scope in ('sequence', 'micro_batch'):
    losses: list[float] = []
    for r in rows:
      losses += set_losses(
        logits[r],
        expert_ids[r],
        mask[r],
        sets_of(scope, segment_ids[r]),
        score_fn=score_fn,
        assignment=assignment,
      )
    return mean_over_sets(losses)
  assert scope == 'global_batch', (
    f'{scope=} spans several micro-batches without being the whole batch'
  )
  num_experts, top_k = logits.shape[-1], expert_ids.shape[-1]
  counts = load(assignment_of(logits, expert_ids, score_fn, assignment), mask, num_experts)
  n = mask.sum()
  total = 0.0
  for r in rows:
    p = probabilities(logits[r], score_fn)
    for t in np.ndindex(mask[r].shape):
      if mask[r][t]:
        total += num_experts / (top_k * n**2) * math.fsum(counts * p[t])
  return total
