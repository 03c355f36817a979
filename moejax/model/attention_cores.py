"""Softmax attention within documents, from q, k and v on: who sees whom, and an implementation for each platform.

Letters: B batch, S queries, T keys, H heads, J key-value heads, d width of q and k, v of a value.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model.splash_attention import splash, supports
from moejax.sharding.logical_axes import platform

CHUNKS, WINDOW_CHUNKS = 4, 16  # of queries: without a window, and at most with one


def visible(
  query_segments: Array, key_segments: Array, query_slots: Array, key_slots: Array, window: int
) -> Array:
  """Which keys a query sees: of its own document, not later than itself, and less than `window` (0: any) before it.

  A padding query (segment 0) sees the padding before it, so that its softmax is defined; nobody reads the result.

  Args:
    query_segments, key_segments: [B, S] and [B, T] i32.
    query_slots, key_slots: the order of tokens in a row, [S] and [T], or for each row its own, [B, S] and [B, T].

  Returns:
    [B, 1, S, T] bool.
  """
  query, key = query_slots[..., :, None], key_slots[..., None, :]
  seen = query >= key
  if window:
    seen &= query - key < window
  return (seen & (query_segments[:, :, None] == key_segments[:, None, :]))[:, None]


def softmax_with_sinks(scores: Array, sinks: Array) -> Array:
  """Softmax of [scores, sink] without the sink's column, which is never made: scores [B, J, G, S, T], sinks [J * G]."""
  sinks = sinks.reshape(*scores.shape[1:3], 1, 1)
  largest = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
  weights = jnp.exp(scores - largest)
  return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - largest))


def attend(q: Array, k: Array, v: Array, mask: Array, scale: float, sinks: Array | None) -> Array:
  """Softmax attention, the softmax in float32.

  Args:
    q, k, v: [B, S, H, d], [B, T, J, d], [B, T, J, v]; query head h reads key head h // (H / J).
    mask: [B, 1, S, T]; every query must see something.
    sinks: [H] f32, logits of one more key, which everybody sees and which has no value; None: without.

  Returns:
    [B, S, H, v].
  """
  b, s, h, d = q.shape
  q = q.reshape(b, s, k.shape[2], -1, d)
  scores = jnp.einsum('bsjgd,btjd->bjgst', q, k).astype(jnp.float32) * scale
  scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1) if sinks is None else softmax_with_sinks(scores, sinks)
  return jnp.einsum('bjgst,btjd->bsjgd', probs.astype(v.dtype), v).reshape(b, s, h, v.shape[-1])


def chunked(
  q: Array, k: Array, v: Array, segments: Array, window: int, scale: float, sinks: Array | None
) -> Array:
  """Each chunk of queries against the keys that it can see. For CPU: 4 chunks do 5/8 of the square's work."""
  length = q.shape[1]
  chunks = min(WINDOW_CHUNKS, max(CHUNKS, 2 * length // window)) if window else CHUNKS
  edges = sorted({length * i // chunks for i in range(chunks + 1)})
  slots = jnp.arange(length)

  def chunk(first: int, end: int) -> Array:
    queries, keys = slice(first, end), slice(max(0, first - window + 1) if window else 0, end)
    mask = visible(segments[:, queries], segments[:, keys], slots[queries], slots[keys], window)
    return attend(q[:, queries], k[:, keys], v[:, keys], mask, scale, sinks)

  return jnp.concatenate([chunk(a, b) for a, b in zip(edges, edges[1:])], axis=1)


def library(
  implementation: str,
  q: Array,
  k: Array,
  v: Array,
  segments: Array,
  window: int,
  scale: float,
  sinks: Array | None,
) -> Array:
  """`jax.nn.dot_product_attention`: 'xla' runs everywhere, 'cudnn' is a fused kernel.

  It knows no sinks: `chunked` does these. It wants one width for q, k and v, cuDNN a multiple of 8: the rest is filled
  with zeros. cuDNN also wants half precision, an even length, and before Hopper heads of 128 at most.
  """
  if sinks is not None:
    return chunked(q, k, v, segments, window, scale, sinks)
  if q.dtype == jnp.float32 or q.shape[1] % 2:
    implementation = 'xla'
  width = max(q.shape[-1], v.shape[-1])
  if implementation == 'cudnn':
    width += -width % 8
  q, k, wide_v = (jnp.pad(a, (*((0, 0),) * 3, (0, width - a.shape[-1]))) for a in (q, k, v))
  slots = jnp.arange(q.shape[1])
  mask = visible(segments, segments, slots, slots, window)
  y = jax.nn.dot_product_attention(
    q, k, wide_v, mask=mask, scale=scale, implementation=implementation
  )
  return y[..., : v.shape[-1]]


def splash_or_xla(
  q: Array, k: Array, v: Array, segments: Array, window: int, scale: float, sinks: Array | None
) -> Array:
  """JAX's kernel for TPUs; 'xla' of what does not divide into its blocks, or over the mesh."""
  return (splash if supports(q, k) else ATTENTIONS['xla'])(q, k, v, segments, window, scale, sinks)


Core = Callable[[Array, Array, Array, Array, int, float, Array | None], Array]

# name -> (q [B, S, H, d], k [B, S, J, d], v [B, S, J, v], segments [B, S], window, scale, sinks) -> [B, S, H, v]
ATTENTIONS: dict[str, Core] = {
  'chunked': chunked,
  'cudnn': functools.partial(library, 'cudnn'),
  'splash': splash_or_xla,
  'xla': functools.partial(library, 'xla'),
}
BEST_CORES = {'cpu': 'chunked', 'gpu': 'cudnn', 'tpu': 'splash'}


def core(implementation: str) -> Core:
  """The row of ATTENTIONS; of 'auto' the best of the platform."""
  return ATTENTIONS[BEST_CORES[platform()] if implementation == 'auto' else implementation]
