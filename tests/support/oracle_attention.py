"""What the equations of norms, RoPE and attention say, in slow float64 NumPy.

Letters: B batch, S sequence, D model, H heads, d of a head.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from moejax.certify.oracle.routing import F64, softmax


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
  """The angle by which each pair of a head turns from one position to the next, YaRN. [d / 2].

  As published in code: pairs up to `low` turn as they did, those from `high` on `factor` times
  slower. low and high are where theta^(-2i/d) turns beta_fast and beta_slow times within
  original_length; i is real.
  """

  def pair_that_turns(beta: float) -> float:
    return d / 2 * math.log(original_length / (2 * math.pi * beta)) / math.log(theta)

  low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, d - 1)
  if low == high:
    high += 0.001  # so that nothing is divided by 0
  frequencies = []
  for i in range(d // 2):
    slowed = min(max((i - low) / (high - low), 0), 1)
    frequencies.append(theta ** (-2 * i / d) * ((1 - slowed) + slowed / factor))
  return np.array(frequencies)


def mscale(factor: float, scale: float) -> float:
  """YaRN's magnitude as published in code: 0.1 scale log(factor) + 1."""
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
  """RoPE, x [B, S, H, d]: the pair (x_i, x_{i + r/2}) turns by position * theta^(-2i/r).

  r is `rotated`, or d where that is 0. Interleaved: the pair (x_2i, x_{2i+1}), in its place. Pairs
  that turn grow by `magnitude`.
  """
  x, positions = np.asarray(x, np.float64), np.asarray(positions)
  r = rotated or x.shape[-1]
  y = x.copy()
  for b, s in np.ndindex(positions.shape):
    for i in range(r // 2):
      frequency = theta ** (-2 * i / r) if frequencies is None else frequencies[i]
      angle = positions[b, s] * frequency
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
  """Grouped-query attention, q [B, S, H, d]; k [B, S, H_kv, d]; v [B, S, H_kv, d_v].

  Returns [B, S, H, d_v]. Head h reads key head h // (H / H_kv); a token sees the tokens of its own
  document up to itself, of a window the last `window` of them. scale 0 is d^(-1/2). A sink is the
  score of one more key, whose value is 0.
  """
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  segment_ids = np.asarray(segment_ids)
  per_kv = q.shape[2] // k.shape[2]
  y = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, s, h in np.ndindex(q.shape[:3]):
    first = max(0, s - window + 1) if window else 0
    seen = [j for j in range(first, s + 1) if segment_ids[b, j] == segment_ids[b, s]]
    scores = [q[b, s, h] @ k[b, j, h // per_kv] * (scale or q.shape[-1] ** -0.5) for j in seen]
    if sinks is not None:
      scores.append(np.asarray(sinks, np.float64)[h])
    p = softmax(np.array(scores))
    # Without the sink's weight, which is the last and multiplies nothing.
    y[b, s, h] = sum(w * v[b, j, h // per_kv] for w, j in zip(p, seen))
  return y


def affine(w: dict[str, F64], name: str, x: F64) -> F64:
  """x times the weight of this name, plus its bias where there is one. [..., D] -> [..., D']."""
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
  """DeepSeek-V2's equations of multi-head latent attention, x [B, S, D] -> [B, S, D].

  The weights are as published. Without `q_a.w`, queries are `q.w` x. Per head, queries hold
  [without position, with], kv_b [key, value]; kv_a holds [latent, key with position], and that key
  is the same for all heads. `turn` is RoPE of [B, S, H, r].
  """
  x, linear = np.asarray(x, np.float64), functools.partial(affine, w)
  b, s, _ = x.shape
  rank = len(w['kv_a_norm.scale'])
  if 'q.w' in w:
    q = linear('q', x)
  else:
    q = linear('q_b', rms_norm(linear('q_a', x), w['q_a_norm.scale'], eps))
  q = q.reshape(b, s, heads, -1)
  compressed = linear('kv_a', x)
  kv = linear('kv_b', rms_norm(compressed[..., :rank], w['kv_a_norm.scale'], eps))
  kv = kv.reshape(b, s, heads, -1)
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
  """A layer of grouped-query attention, x [B, S, D] -> [B, S, D].

  Projections, norm of queries and keys ('', 'head', 'projection'), clip, RoPE, attention, out.
  """
  x, linear = np.asarray(x, np.float64), functools.partial(affine, w)

  def heads_of(name: str) -> F64:
    y = linear(name, x)
    if qk_norm == 'projection' and name != 'v':
      y = rms_norm(y, w[f'{name}_norm.scale'], eps)
    y = y.reshape(*x.shape[:2], -1, d_head)
    if qk_norm == 'head' and name != 'v':
      y = rms_norm(y, w[f'{name}_norm.scale'], eps)
    y = np.clip(y, -clip, clip) if clip else y
    return y if name == 'v' else turn(y)

  q, k, v = heads_of('q'), heads_of('k'), heads_of('v')
  y = attention(q, k, v, segment_ids, window=window, scale=scale, sinks=w.get('sinks'))
  return linear('out', y.reshape(*x.shape[:2], -1))
