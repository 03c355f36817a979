"""What the equations say: slow, plain float64 NumPy, written from the formulas and never from moejax.

Loops over tokens and experts stand where the equation has a sum; nothing here is meant to be fast. An
equation number is cited only where the paper was read; what is derived says so. Routing, balance and the bias
rules are `moejax/certify/oracle*.py`, which the certificate carries with it; their names are found here, too.
Letters: B batch S sequence D model F hidden E experts K experts per token C capacity T = B*S.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.balance import *
from moejax.certify.oracle.bias import *
from moejax.certify.oracle.routing import *
from moejax.certify.oracle.routing import F64, Bool, logsumexp, sigmoid, softmax
from moejax.certify.oracle.selection import *

IGNORE = -100


# Experts and dispatch. Weights: gate, up [E, D, F], down [E, F, D], and perhaps biases: gate, up [E, F], down [E, D].


def silu(v: F64) -> F64:
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
  """One token through an expert of gpt-oss: g = min(x gate + b, limit), u = clip(x up + c, -limit, limit).

  down((u + 1) g sigmoid(1.702 g)) + d.
  """
  g = np.array([min(v, limit) for v in x @ gate + gate_bias])
  u = np.array([min(max(v, -limit), limit) for v in x @ up + up_bias])
  return ((u + 1) * g * sigmoid(1.702 * g)) @ down + down_bias


def capacity_of(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
  return math.ceil(tokens * top_k / num_experts * capacity_factor)


def kept_copies(
  expert_ids: ArrayLike, priority: ArrayLike, num_experts: int, capacity: int, policy: str
) -> Bool:
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
  """y_t = Σ_k w_tk FFN_{e_tk}(x_t) over copies kept, weights as they are, + Σ shared FFN(x_t); x [T, D].

  The sum of the shared ones, which are SwiGLUs always, is times sigmoid(x_t shared_gate) where there is such [D, 1].
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
  rows = [
    np.asarray(p, np.float64)[t] for t in np.ndindex(np.asarray(mask).shape) if np.asarray(mask)[t]
  ]
  mean = math.fsum(entropy(row) for row in rows) / len(rows)
  return mean, entropy(np.mean(rows, axis=0)) - mean


# The rest of the model.


def rms_norm(x: ArrayLike, weight: ArrayLike, eps: float) -> F64:
  """x / sqrt(mean(x²) + eps) * weight, over the last axis."""
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def yarn_frequencies(
  d: int,
  theta: float,
  factor: float,
  original_length: int,
  beta_fast: float = 32,
  beta_slow: float = 1,
  truncate: bool = True,
) -> F64:
  """YaRN as published in code: pairs up to `low` turn as they did, those from `high` on `factor` times slower.

  low and high are where theta^(-2i/d) turns beta_fast and beta_slow times within original_length; i is real.
  """
  low, high = (
    d / 2 * math.log(original_length / (2 * math.pi * beta)) / math.log(theta)
    for beta in (beta_fast, beta_slow)
  )
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, d - 1)
  if low == high:
    high += 0.001
  frequencies = []
  for i in range(d // 2):
    slowed = min(max((i - low) / (high - low), 0), 1)
    frequencies.append(theta ** (-2 * i / d) * ((1 - slowed) + slowed / factor))
  return np.array(frequencies)


def mscale(factor: float, scale: float) -> float:
  return 0.1 * scale * math.log(factor) + 1


def rope(
  x: ArrayLike,
  positions: ArrayLike,
  theta: float,
  *,
  rotated: int = 0,
  interleaved: bool = False,
  frequencies: F64 | None = None,
  magnitude: float = 1.0,
) -> F64:
  """RoPE, x [B, S, H, d]: the pair (x_i, x_{i + r/2}) turns by position * theta^(-2i/r), r = `rotated` or d.

  Interleaved: the pair (x_2i, x_{2i+1}), in its place. Pairs that turn grow by `magnitude`.
  """
  x, positions = np.asarray(x, np.float64), np.asarray(positions)
  r = rotated or x.shape[-1]
  y = x.copy()
  for b, s in np.ndindex(positions.shape):
    for i in range(r // 2):
      angle = positions[b, s] * (theta ** (-2 * i / r) if frequencies is None else frequencies[i])
      cos, sin = magnitude * math.cos(angle), magnitude * math.sin(angle)
      m, n = (2 * i, 2 * i + 1) if interleaved else (i, i + r // 2)
      y[b, s, :, m] = x[b, s, :, m] * cos - x[b, s, :, n] * sin
      y[b, s, :, n] = x[b, s, :, n] * cos + x[b, s, :, m] * sin
  return y


def attention(
  q: ArrayLike,
  k: ArrayLike,
  v: ArrayLike,
  segment_ids: ArrayLike,
  *,
  window: int = 0,
  scale: float = 0.0,
  sinks: ArrayLike | None = None,
) -> F64:
  """Grouped-query attention: q [B, S, H, d]; k [B, S, H_kv, d]; v [B, S, H_kv, d_v] -> [B, S, H, d_v].

  Head h reads key head h // (H / H_kv); a token sees the tokens of its own document up to itself, of a window the
  last `window` of them. scale 0 is d^(-1/2). A sink is the score of one more key, whose value is 0.
  """
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  segment_ids = np.asarray(segment_ids)
  per_kv = q.shape[2] // k.shape[2]
  y = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, s, h in np.ndindex(q.shape[:3]):
    seen = [
      j
      for j in range(s + 1)
      if segment_ids[b, j] == segment_ids[b, s] and (not window or 0 <= s - j < window)
    ]
    scores = [q[b, s, h] @ k[b, j, h // per_kv] * (scale or q.shape[-1] ** -0.5) for j in seen]
    p = softmax(np.array(scores if sinks is None else [*scores, np.asarray(sinks, np.float64)[h]]))
    y[b, s, h] = sum(w * v[b, j, h // per_kv] for w, j in zip(p, seen))
  return y


def affine(w: dict[str, F64], name: str, x: F64) -> F64:
  y = x @ w[f'{name}.w']
  return y + w[f'{name}.b'] if f'{name}.b' in w else y


def latent_attention(
  x: ArrayLike,
  w: dict[str, F64],
  segment_ids: ArrayLike,
  *,
  heads: int,
  d_head: int,
  eps: float,
  turn: Callable[[F64], F64],
  window: int = 0,
  scale: float,
) -> F64:
  """DeepSeek-V2's equations of multi-head latent attention, x [B, S, D] -> [B, S, D], weights as published.

  Without `q_a.w`, queries are `q.w` x. Per head, queries hold [without position, with], kv_b [key, value]; kv_a holds
  [latent, key with position], and that key is the same for all heads. `turn` is RoPE of [B, S, H, r].
  """
  x, linear = np.asarray(x, np.float64), functools.partial(affine, w)
  b, s, _ = x.shape
  rank = len(w['kv_a_norm.scale'])
  q = (
    linear('q', x)
    if 'q.w' in w
    else linear('q_b', rms_norm(linear('q_a', x), w['q_a_norm.scale'], eps))
  )
  q = q.reshape(b, s, heads, -1)
  compressed = linear('kv_a', x)
  kv = linear('kv_b', rms_norm(compressed[..., :rank], w['kv_a_norm.scale'], eps)).reshape(
    b, s, heads, -1
  )
  shared = turn(compressed[:, :, None, rank:])
  q = np.concatenate([q[..., :d_head], turn(q[..., d_head:])], axis=-1)
  k = np.concatenate([kv[..., :d_head], np.repeat(shared, heads, axis=2)], axis=-1)
  y = attention(q, k, kv[..., d_head:], segment_ids, window=window, scale=scale)
  return linear('out', y.reshape(b, s, -1))


def grouped_attention(
  x: ArrayLike,
  w: dict[str, F64],
  segment_ids: ArrayLike,
  *,
  d_head: int,
  eps: float,
  qk_norm: str,
  clip: float,
  turn: Callable[[F64], F64],
  window: int,
  scale: float,
) -> F64:
  """A layer of grouped-query attention: projections, norm ('', 'head', 'projection'), clip, RoPE, attention, out."""
  x, linear = np.asarray(x, np.float64), functools.partial(affine, w)

  def made(name: str) -> F64:
    y = linear(name, x)
    if qk_norm == 'projection' and name != 'v':
      y = rms_norm(y, w[f'{name}_norm.scale'], eps)
    y = y.reshape(*x.shape[:2], -1, d_head)
    if qk_norm == 'head' and name != 'v':
      y = rms_norm(y, w[f'{name}_norm.scale'], eps)
    y = np.clip(y, -clip, clip) if clip else y
    return y if name == 'v' else turn(y)

  y = attention(
    made('q'), made('k'), made('v'), segment_ids, window=window, scale=scale, sinks=w.get('sinks')
  )
  return linear('out', y.reshape(*x.shape[:2], -1))


def cross_entropy(
  logits: ArrayLike, targets: ArrayLike, z_coefficient: float = 0.0
) -> tuple[float, float, int]:
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
