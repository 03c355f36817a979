"""What the equations of routing and balance say: slow float64 NumPy, from the formulas, never from moejax.

Loops over tokens and experts stand where the equation has a sum; nothing here is meant to be fast. An
equation number is cited only where the paper was read; what is derived says so.
Letters: B batch S sequence D model F hidden E experts K experts per token C capacity G groups T = B*S.
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
  """Gradient of a scalar function by central differences; error O(eps²) plus rounding O(1e-16 / eps)."""
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


# Scores and probabilities of one token, z [E].


def logsumexp(z: F64) -> float:
  """log Σ exp z, of one token [E]."""
  top = float(np.max(z))
  return top + math.log(math.fsum(math.exp(v - top) for v in z))


def log_sigmoid(z: F64) -> F64:
  """log 1/(1 + exp(-z)), entry by entry."""
  return np.array([-math.log1p(math.exp(-v)) if v >= 0 else v - math.log1p(math.exp(v)) for v in z])


def softmax(z: F64) -> F64:
  """exp z / Σ exp z, of one token [E]."""
  return np.exp(z - logsumexp(z))


def sigmoid(z: F64) -> F64:
  """1/(1 + exp(-z)), entry by entry."""
  return np.exp(log_sigmoid(z))


def log_sqrt_softplus(z: F64) -> F64:
  """log sqrt(log(1 + exp z)), entry by entry; log(1 + x) is x to float64 where x = exp z is below exp(-37)."""
  return np.array([v / 2 if v < -37 else math.log(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) / 2 for v in z])


SCORES: dict[str, Callable[[F64], F64]] = {
    'softmax': softmax, 'sigmoid': sigmoid, 'sqrt_softplus': lambda z: np.exp(log_sqrt_softplus(z))}
LOG_SCORES: dict[str, Callable[[F64], F64]] = {
    'softmax': lambda z: z - logsumexp(z), 'sigmoid': log_sigmoid, 'sqrt_softplus': log_sqrt_softplus}


def scores(logits: ArrayLike, score_fn: str) -> F64:
  """s_te over all E experts, before any choice."""
  return np.apply_along_axis(SCORES[score_fn], -1, np.asarray(logits, np.float64))


def probabilities(logits: ArrayLike, score_fn: str) -> F64:
  """p_te = s_te / Σ_e' s_te' over all E experts (DeepSeek-V3 eq. 17-20 for sigmoid).

  As exp(log s - log Σ s), so that a row of scores that all underflow still sums to 1.
  """
  def one(z: F64) -> F64:
    log_s = LOG_SCORES[score_fn](z)
    return np.exp(log_s - logsumexp(log_s))
  return np.apply_along_axis(one, -1, np.asarray(logits, np.float64))


# Routing.


class Routing(NamedTuple):
  """What a router decided, of a batch of tokens."""
  logits: F64       # [B, S, E]
  scores: F64       # [B, S, E]
  expert_ids: I64   # [B, S, K]
  weights: F64      # [B, S, K]


def best(values: ArrayLike, k: int) -> list[int]:
  """Indices of the k largest values, largest first, ties to the lowest index."""
  values = [float(v) for v in np.asarray(values)]
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def choose(choice: F64, top_k: int, num_groups: int, top_groups: int) -> list[int]:
  """The K experts of one token, choice = s + b [E]: of the groups with the largest sum of two best."""
  size = len(choice) // num_groups
  worth = [sum(sorted(choice[g * size:(g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
  kept = best(worth, top_groups)
  allowed = [choice[e] if e // size in kept else -math.inf for e in range(len(choice))]
  return best(allowed, top_k)


def weigh(logits: ArrayLike, expert_ids: ArrayLike, score_fn: str, renormalise: bool = True,
          scale: float = 1.0) -> F64:
  """Weights of the experts chosen, from s without the bias; 1e-20 guards a sum of zeros."""
  s, expert_ids = scores(logits, score_fn), np.asarray(expert_ids)
  weights = np.zeros(expert_ids.shape)
  for t in np.ndindex(expert_ids.shape[:-1]):
    w = np.array([s[t][e] for e in expert_ids[t]])
    weights[t] = scale * (w / (w.sum() + 1e-20) if renormalise else w)
  return weights


def route(logits: ArrayLike, bias: ArrayLike, *, top_k: int, score_fn: str, num_groups: int = 1,
          top_groups: int = 1, renormalise: bool = True, scale: float = 1.0) -> Routing:
  """Choose with s + b, weigh with s."""
  logits, bias = np.asarray(logits, np.float64), np.asarray(bias, np.float64)
  s = scores(logits, score_fn)
  expert_ids = np.zeros((*s.shape[:-1], top_k), np.int64)
  for t in np.ndindex(s.shape[:-1]):
    expert_ids[t] = choose(s[t] + bias, top_k, num_groups, top_groups)
  return Routing(logits, s, expert_ids, weigh(logits, expert_ids, score_fn, renormalise, scale))


def load(expert_ids: ArrayLike, mask: ArrayLike, num_experts: int) -> F64:
  """c_e: how many tokens that count chose expert e."""
  counts = np.zeros(num_experts)
  expert_ids, mask = np.asarray(expert_ids), np.asarray(mask)
  for t in np.ndindex(mask.shape):
    if mask[t]:
      for e in expert_ids[t]:
        counts[e] += 1
  return counts


# The balance loss. A set is a number; sets [B, S] holds each token's set, -1 for none.


def document_sets(segment_ids: ArrayLike) -> I64:
  """One set a document: the tokens of one row with one segment id > 0."""
  segment_ids = np.asarray(segment_ids)
  sets, number = np.full(segment_ids.shape, -1, np.int64), 0
  for b in range(len(segment_ids)):
    for segment in sorted(set(segment_ids[b].tolist()) - {0}):
      sets[b, segment_ids[b] == segment] = number
      number += 1
  return sets


def row_sets(shape: tuple[int, int], groups: int) -> I64:
  """Rows cut into contiguous groups of equal row count; 1 group is the global batch."""
  return np.broadcast_to(np.arange(shape[0])[:, None] // (shape[0] // groups), shape)


def sets_of(scope: str, segment_ids: ArrayLike, *, micro_batches: int = 1, ep_groups: int = 1) -> I64:
  """The set of every token [B, S] under a scope."""
  shape = np.asarray(segment_ids).shape
  groups = {'micro_batch': micro_batches, 'ep_group': ep_groups, 'global_batch': 1}
  return document_sets(segment_ids) if scope == 'sequence' else row_sets(shape, groups[scope])


def assignment_of(logits: ArrayLike, expert_ids: ArrayLike, score_fn: str, assignment: str) -> I64:
  """Who counts. 'dispatched': the experts that were used. 'unbiased': M° of DeepSeek-V3 eq. 18, top K of s.

  M° knows neither bias nor groups.
  """
  expert_ids = np.asarray(expert_ids)
  if assignment == 'dispatched':
    return expert_ids
  assert assignment == 'unbiased', assignment
  return np.apply_along_axis(lambda s: np.array(best(s, expert_ids.shape[-1])), -1, scores(logits, score_fn))


def set_losses(logits: ArrayLike, expert_ids: ArrayLike, mask: ArrayLike, sets: I64, *, score_fn: str,
               assignment: str) -> list[float]:
  """L_g of every non-empty set g: Σ_e f_e P_e, f_e = E/(K n) Σ_t M_te, P_e = 1/n Σ_t p_te, n tokens.

  DeepSeek-V3 eq. 17-20 for a sequence, Qwen 2501.11873 eq. 2-6 for the global batch; other sets by analogy.
  """
  chosen = assignment_of(logits, expert_ids, score_fn, assignment)
  p, mask = probabilities(logits, score_fn), np.asarray(mask)
  num_experts, top_k = p.shape[-1], chosen.shape[-1]
  losses = []
  for g in range(int(sets.max()) + 1):
    tokens = [t for t in np.ndindex(mask.shape) if mask[t] and sets[t] == g]
    if not tokens:
      continue
    total = 0.0
    for e in range(num_experts):
      f = num_experts / (top_k * len(tokens)) * sum(1 for t in tokens if e in chosen[t])
      total += f * math.fsum(p[t][e] for t in tokens) / len(tokens)
    losses.append(total)
  return losses


def balance_loss(logits: ArrayLike, expert_ids: ArrayLike, mask: ArrayLike, sets: I64, *,
                 score_fn: str, assignment: str) -> float:
  """The plain mean of L_g over the non-empty sets; 0 where no token counts (no paper says)."""
  losses = set_losses(logits, expert_ids, mask, sets, score_fn=score_fn, assignment=assignment)
  return math.fsum(losses) / len(losses) if losses else 0.0


def router_z(logits: ArrayLike, mask: ArrayLike) -> float:
  """Mean over the tokens that count of (log Σ_e exp z_te)²; after ST-MoE, whose text was not read."""
  logits, mask = np.asarray(logits, np.float64), np.asarray(mask)
  squares = [logsumexp(logits[t])**2 for t in np.ndindex(mask.shape) if mask[t]]
  return math.fsum(squares) / len(squares) if squares else 0.0


def loss(name: str, logits: ArrayLike, expert_ids: ArrayLike, mask: ArrayLike, segment_ids: ArrayLike, *,
         score_fn: str, assignment: str, micro_batches: int = 1, ep_groups: int = 1) -> float:
  """The loss of this name, without coefficient, on a whole batch."""
  if name == 'router_z':
    return router_z(logits, mask)
  sets = sets_of(name, segment_ids, micro_batches=micro_batches, ep_groups=ep_groups)
  return balance_loss(logits, expert_ids, mask, sets, score_fn=score_fn, assignment=assignment)


def accumulated_balance_loss(scope: str, logits: ArrayLike, expert_ids: ArrayLike, mask: ArrayLike,
                             segment_ids: ArrayLike, *, micro_batches: int, score_fn: str,
                             assignment: str) -> float:
  """The loss of a batch of micro-batches, put together from parts that each see one of them only.

  Derived here: for the sequence and micro-batch scopes sums of L_g and of set counts add up. For the global
  batch L is linear in p once the counts c of the whole batch are known: E/(K n²) Σ_e c_e Σ_t p_te add up.
  """
  logits, expert_ids, mask, segment_ids = map(np.asarray, (logits, expert_ids, mask, segment_ids))
  rows = np.split(np.arange(len(mask)), micro_batches)
  if scope in ('sequence', 'micro_batch'):
    losses: list[float] = []
    for r in rows:
      losses += set_losses(logits[r], expert_ids[r], mask[r], sets_of(scope, segment_ids[r]),
                           score_fn=score_fn, assignment=assignment)
    return math.fsum(losses) / len(losses) if losses else 0.0
  assert scope == 'global_batch', f'{scope=} spans several micro-batches without being the whole batch'
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
