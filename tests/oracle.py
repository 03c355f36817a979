"""What the equations say: slow, plain float64 NumPy, written from the formulas and never from moejax.

Loops over tokens and experts stand where the equation has a sum; nothing here is meant to be fast. An
equation number is cited only where the paper was read; what is derived says so.
Letters: B batch S sequence D model F hidden E experts K experts per token C capacity G groups T = B*S.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
IGNORE = -100


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
  top = float(np.max(z))
  return top + math.log(math.fsum(math.exp(v - top) for v in z))


def log_sigmoid(z: F64) -> F64:
  return np.array([-math.log1p(math.exp(-v)) if v >= 0 else v - math.log1p(math.exp(v)) for v in z])


def softmax(z: F64) -> F64:
  return np.exp(z - logsumexp(z))


def sigmoid(z: F64) -> F64:
  return np.exp(log_sigmoid(z))


SCORES: dict[str, Callable[[F64], F64]] = {'softmax': softmax, 'sigmoid': sigmoid}
LOG_SCORES: dict[str, Callable[[F64], F64]] = {
    'softmax': lambda z: z - logsumexp(z), 'sigmoid': log_sigmoid}


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


# Loss-free bias rules: b, c [E]; counts of the global batch; c̄ = T K / E is the mean count.


def sign_rule(bias: ArrayLike, counts: ArrayLike, rate: float) -> F64:
  """b += u sign(c̄ - c): 2408.15664 Alg. 1."""
  counts = np.asarray(counts, np.float64)
  return np.asarray(bias, np.float64) + rate * np.sign(counts.mean() - counts)


def proportional_rule(bias: ArrayLike, counts: ArrayLike, rate: float) -> F64:
  """b += u (1 - c / c̄); a step in which no token counts moves nothing (derived: no error)."""
  counts = np.asarray(counts, np.float64)
  error = 1 - counts / counts.mean() if counts.sum() > 0 else np.zeros_like(counts)
  return np.asarray(bias, np.float64) + rate * error


BIAS_RULES = {'sign': sign_rule, 'proportional': proportional_rule}


# Experts and dispatch. Weights: gate, up [E, D, F], down [E, F, D].


def silu(v: F64) -> F64:
  return v * sigmoid(v)


def swiglu(x: F64, gate: F64, up: F64, down: F64) -> F64:
  """One token x [D] through one expert: down(silu(x gate) * (x up))."""
  return (silu(x @ gate) * (x @ up)) @ down


def capacity_of(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
  return math.ceil(tokens * top_k / num_experts * capacity_factor)


def kept_copies(expert_ids: ArrayLike, priority: ArrayLike, num_experts: int, capacity: int,
                policy: str) -> Bool:
  """Which copies [T, K] find room: an expert's first ones ('position') or its best by priority ('probs').

  By position means by the token's place, so that a later token never evicts an earlier one. Ties of priority
  [T, K] go to the earlier token.
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


def moe(x: ArrayLike, expert_ids: ArrayLike, weights: ArrayLike, experts: tuple[F64, F64, F64],
        kept: Bool | None = None, shared: Sequence[tuple[F64, F64, F64]] = ()) -> F64:
  """y_t = Σ_k w_tk FFN_{e_tk}(x_t) over copies kept, weights as they are, + Σ shared FFN(x_t); x [T, D]."""
  x = np.asarray(x, np.float64)
  expert_ids, weights = np.asarray(expert_ids), np.asarray(weights, np.float64)
  gate, up, down = (np.asarray(w, np.float64) for w in experts)
  y = np.zeros_like(x)
  for t in range(len(x)):
    for k, e in enumerate(expert_ids[t]):
      if kept is None or kept[t, k]:
        y[t] += weights[t, k] * swiglu(x[t], gate[e], up[e], down[e])
    for one in shared:
      y[t] += swiglu(x[t], *(np.asarray(w, np.float64) for w in one))
  return y


# Router statistics of counts c [E].


def max_vio(counts: ArrayLike) -> float:
  """max_e c_e / c̄ - 1."""
  counts = np.asarray(counts, np.float64)
  return float(counts.max() / counts.mean() - 1)


def expert_usage(counts: ArrayLike) -> float:
  return sum(1 for c in np.asarray(counts) if c > 0) / len(np.asarray(counts))


def dead_experts(counts: ArrayLike) -> int:
  """Experts with less than a tenth of an even share."""
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
  return -math.fsum(q * math.log(q) for q in np.asarray(p, np.float64) if q > 0)


def router_entropies(p: ArrayLike, mask: ArrayLike) -> tuple[float, float]:
  """mean_t H(p_t) and I(expert; token) = H(mean_t p_t) - mean_t H(p_t), tokens that count; p [B, S, E]."""
  rows = [np.asarray(p, np.float64)[t] for t in np.ndindex(np.asarray(mask).shape) if np.asarray(mask)[t]]
  mean = math.fsum(entropy(row) for row in rows) / len(rows)
  return mean, entropy(np.mean(rows, axis=0)) - mean


# The rest of the model.


def rms_norm(x: ArrayLike, weight: ArrayLike, eps: float) -> F64:
  """x / sqrt(mean(x²) + eps) * weight, over the last axis."""
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def rope(x: ArrayLike, positions: ArrayLike, theta: float) -> F64:
  """Rotate-half RoPE, x [B, S, H, d]: the pair (x_i, x_{i + d/2}) turns by position * theta^(-2i/d)."""
  x, positions = np.asarray(x, np.float64), np.asarray(positions)
  d = x.shape[-1]
  y = np.zeros_like(x)
  for b, s in np.ndindex(positions.shape):
    for i in range(d // 2):
      angle = positions[b, s] * theta**(-2 * i / d)
      cos, sin = math.cos(angle), math.sin(angle)
      y[b, s, :, i] = x[b, s, :, i] * cos - x[b, s, :, i + d // 2] * sin
      y[b, s, :, i + d // 2] = x[b, s, :, i + d // 2] * cos + x[b, s, :, i] * sin
  return y


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, segment_ids: ArrayLike) -> F64:
  """Grouped-query attention: q [B, S, H, d]; k, v [B, S, H_kv, d] -> [B, S, H, d].

  Head h reads key head h // (H / H_kv); a token sees the tokens of its own document up to itself.
  """
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  segment_ids = np.asarray(segment_ids)
  per_kv = q.shape[2] // k.shape[2]
  y = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, s, h in np.ndindex(q.shape[:3]):
    seen = [j for j in range(s + 1) if segment_ids[b, j] == segment_ids[b, s]]
    p = softmax(np.array([q[b, s, h] @ k[b, j, h // per_kv] for j in seen]) / math.sqrt(q.shape[-1]))
    y[b, s, h] = sum(w * v[b, j, h // per_kv] for w, j in zip(p, seen, strict=True))
  return y


def cross_entropy(logits: ArrayLike, targets: ArrayLike,
                  z_coefficient: float = 0.0) -> tuple[float, float, int]:
  """(Σ (logsumexp - target's logit), Σ z_coefficient logsumexp², tokens); target -100 counts nowhere."""
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
  return math.sqrt(math.fsum(float((np.asarray(g, np.float64)**2).sum()) for g in gradients.values()))


def adamw(params: dict[str, F64], steps: Sequence[dict[str, F64]], *, rates: Sequence[float], b1: float,
          b2: float, eps: float, weight_decay: float, decay: dict[str, bool], clip: float) -> dict[str, F64]:
  """Parameters after one AdamW step for each dict of gradients.

  Clip to global norm (0 = off), then bias-corrected moments, eps outside the square root; decay is decoupled,
  times the rate, and only where `decay` says so.
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
