"""Causal attention within documents: masks, grouped-query attention, and the cache that decoding keeps.

  x -> q, k, v -> rope -> softmax(q k^T / sqrt(d) + mask) v -> output projection

Letters: B batch, S queries, T keys, H heads, J key-value heads, d head width, D model.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from moejax.config import check
from moejax.layers import Linear
from moejax.rope import RopeConfig, rotate
from moejax.sharding import constrain, platform

QUERY_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention: each of `num_kv_heads` serves num_heads / num_kv_heads query heads.

  implementation: a row of ATTENTIONS, or 'auto' for the best of the platform.
  """

  num_heads: int = 4
  num_kv_heads: int = 4
  d_head: int = 64
  rope: RopeConfig = RopeConfig()
  implementation: str = 'auto'

  def __post_init__(self) -> None:
    check(
      *(f'{name}={value}: use 1 or more' for name, value in
        (('num_heads', self.num_heads), ('num_kv_heads', self.num_kv_heads)) if value < 1),
      f'd_head={self.d_head}: use an even number, 2 or more' if self.d_head < 2 or self.d_head % 2 else '',
      f'num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: use a divisor of it'
      if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads else '',
      f'implementation={self.implementation!r} is not one of {["auto", *sorted(ATTENTIONS)]}'
      if self.implementation not in ('auto', *ATTENTIONS) else '',
    )


class KVCache(NamedTuple):
  """What decoding keeps of the tokens so far; slots fill from the left, `segments` is 0 where a slot is empty."""

  k: Array         # [B, T, J, d], already rotated
  v: Array         # [B, T, J, d]
  segments: Array  # [B, T] i32
  length: Array    # scalar i32, slots filled


def empty_cache(batch: int, length: int, cfg: AttentionConfig, dtype: jnp.dtype) -> KVCache:
  """Room for `length` tokens in each of `batch` rows."""
  kv = jnp.zeros((batch, length, cfg.num_kv_heads, cfg.d_head), dtype)
  return KVCache(kv, kv, jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))


def visible(query_segments: Array, key_segments: Array, first_query: Array | int) -> Array:
  """Which keys a query sees: earlier or equal slots of its own document. [B, S], [B, T] -> [B, 1, S, T] bool.

  first_query: the slot of the first query among the keys. A padding query (segment 0) sees the padding before it,
  so that its softmax is defined; nobody reads the result.
  """
  slots = first_query + jnp.arange(query_segments.shape[1])
  causal = slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
  return (causal & (query_segments[:, :, None] == key_segments[:, None, :]))[:, None]


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Softmax attention, the softmax in float32. q [B, S, H, d], k and v [B, T, J, d], mask [B, 1, S, T] -> like q."""
  b, s, h, d = q.shape
  q = q.reshape(b, s, k.shape[2], -1, d)
  scores = jnp.einsum('bsjgd,btjd->bjgst', q, k).astype(jnp.float32) * d**-0.5
  probs = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
  return jnp.einsum('bjgst,btjd->bsjgd', probs, v).reshape(b, s, h, d)


def chunked(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """Each chunk of queries against the prefix of keys it can see: 5/8 of the square's work with 4 chunks. For CPU."""
  length = q.shape[1]
  edges = sorted({length * i // QUERY_CHUNKS for i in range(QUERY_CHUNKS + 1)})
  return jnp.concatenate([
    attend(q[:, a:b], k[:, :b], v[:, :b], visible(segments[:, a:b], segments[:, :b], a))
    for a, b in zip(edges, edges[1:])], axis=1)


def xla(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """`jax.nn.dot_product_attention` as XLA compiles it; what TPUs fuse best without a kernel of our own."""
  return jax.nn.dot_product_attention(q, k, v, mask=visible(segments, segments, 0), implementation='xla')


def cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """`jax.nn.dot_product_attention` by cuDNN's flash attention, which takes half precision only."""
  if q.dtype == jnp.float32:
    return xla(q, k, v, segments)
  return jax.nn.dot_product_attention(q, k, v, mask=visible(segments, segments, 0), implementation='cudnn')


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023) with rotary positions and document masking."""

  def __init__(self, key: Array, d_model: int, cfg: AttentionConfig, std: float) -> None:
    keys = jax.random.split(key, 4)
    self.cfg = cfg
    width, kv_width = cfg.num_heads * cfg.d_head, cfg.num_kv_heads * cfg.d_head
    self.q = Linear(keys[0], (d_model, width), ('embed', 'heads'), std)
    self.k = Linear(keys[1], (d_model, kv_width), ('embed', 'heads'), std)
    self.v = Linear(keys[2], (d_model, kv_width), ('embed', 'heads'), std)
    self.out = Linear(keys[3], (width, d_model), ('heads', 'embed'), std)

  def __call__(self, x: Array, segments: Array, positions: Array, cache: KVCache | None = None
               ) -> tuple[Array, KVCache | None]:
    """x [B, S, D], segments and positions [B, S] -> y [B, S, D] and the cache with these tokens in it."""
    cfg, (b, s, _) = self.cfg, x.shape
    q, k, v = (layer(x).reshape(b, s, -1, cfg.d_head) for layer in (self.q, self.k, self.v))
    q, k = (rotate(a, positions, cfg.rope) for a in (q, k))
    if cache is None:
      run = ATTENTIONS[BEST[platform()] if cfg.implementation == 'auto' else cfg.implementation]
      y = run(*(constrain(a, 'batch', 'sequence', 'heads', '') for a in (q, k, v)), segments)
    else:
      y, cache = attend_cached(q, k, v, segments, cache)
    return self.out(y.reshape(b, s, -1)), cache


def attend_cached(q: Array, k: Array, v: Array, segments: Array, cache: KVCache) -> tuple[Array, KVCache]:
  """Appends k and v to the cache and attends to all of it."""
  at = cache.length

  def append(buffer: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), at, axis=1)

  cache = KVCache(append(cache.k, k), append(cache.v, v), append(cache.segments, segments), at + q.shape[1])
  return attend(q, cache.k, cache.v, visible(segments, cache.segments, at)), cache


# name -> (q [B, S, H, d], k and v [B, S, J, d], segments [B, S]) -> [B, S, H, d]
ATTENTIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
  'chunked': chunked,
  'cudnn': cudnn,
  'xla': xla,
}

BEST = {'cpu': 'chunked', 'gpu': 'cudnn', 'tpu': 'xla'}
