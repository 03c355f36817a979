"""The KV cache that decoding keeps: keys and values of the tokens so far, in a ring where a window bounds them.

Letters: L layers, B batch, S tokens, T places of a cache, J key-value heads, d head width; of latent attention R rank,
r channels of a key that carry its position.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.model.attention_cores import visible
from moejax.model.config import AttentionConfig

AHEAD = 8  # tokens for which a ring has room beside its window: as many can be written, or less one taken back


class KVCache(NamedTuple):
  """What decoding keeps of the tokens so far, for L like layers: the token of slot s of a row lies at place s % T.

  A row is taken back to fewer tokens by lowering its `length`; what is written later overwrites. With a window, T may
  be less than the tokens seen, and then no more than AHEAD - 1 tokens can be taken back.
  All layers are in one array, so that a loop over them carries it: what is written then is a few tokens, in place.
  """

  entries: tuple[
    Array, ...
  ]  # k and v, each [L, B, J, T, d]; or latent and rotated key together, [L, B, 1, T, R + r]
  segments: Array  # [L, B, T] i32, 0 is padding
  length: Array  # [L, B] i32, slots filled
  layer: Array  # i32, whose turn it is


def empty_cache(
  layers: int, batch: int, length: int, cfg: AttentionConfig, window: int, dtype: jnp.dtype
) -> KVCache:
  """Room for `length` tokens in each of `batch` rows, or for as many as a layer with this window needs."""
  room = min(length, window + AHEAD) if window else length
  if cfg.latent.kv_rank:
    widths = [(1, cfg.latent.kv_rank + cfg.latent.d_rope)]
  else:
    widths = [(cfg.num_kv_heads, cfg.d_head)] * 2
  return KVCache(
    tuple(jnp.zeros((layers, batch, heads, room, width), dtype) for heads, width in widths),
    jnp.zeros((layers, batch, room), jnp.int32),
    jnp.zeros((layers, batch), jnp.int32),
    jnp.zeros((), jnp.int32),
  )


def held(length: Array, room: int) -> Array:
  """The slot in each place of a cache: the last below `length` [B] that lies there, or one later than all. [B, T]"""
  last = length[:, None] - 1
  slots = last - (last - jnp.arange(room)) % room
  return jnp.where(slots < 0, jnp.iinfo(slots.dtype).max, slots)


def append(
  cache: KVCache, new: tuple[Array, ...], segments: Array, window: int
) -> tuple[KVCache, tuple[Array, ...], Array]:
  """Writes S tokens to the layer whose turn it is, each of `new` [B, S, J, d].

  -> the cache, the entries to attend to [B, T or T + S, J, d], and which of them each query sees.
  """
  tokens, room, layer = segments.shape[1], cache.segments.shape[-1], cache.layer
  length = cache.length[layer]
  slots = length[:, None] + jnp.arange(tokens)  # [B, S]
  # Not by `vmap` over rows: XLA's CPU backend would copy all of the cache, to lay the axis of one row elsewhere.
  rows, at = jnp.arange(slots.shape[0])[:, None], slots[:, -room:] % room
  written = tuple(
    old.at[layer, rows, :, at].set(a[:, -room:].astype(old.dtype))
    for old, a in zip(cache.entries, new)
  )
  after = KVCache(
    written,
    cache.segments.at[layer, rows, at].set(segments[:, -room:]),
    cache.length.at[layer].add(tokens),
    layer,
  )
  if not window or tokens <= AHEAD:
    mask = visible(segments, after.segments[layer], slots, held(length + tokens, room), window)
    return after, tuple(a[layer].swapaxes(1, 2) for a in after.entries), mask
  # So many tokens would overwrite on a ring what the first of them see.
  entries = tuple(
    jnp.concatenate([old[layer].swapaxes(1, 2), a.astype(old.dtype)], 1)
    for old, a in zip(cache.entries, new)
  )
  key_segments = jnp.concatenate([cache.segments[layer], segments], 1)
  key_slots = jnp.concatenate([held(length, room), slots], 1)
  return after, entries, visible(segments, key_segments, slots, key_slots, window)
