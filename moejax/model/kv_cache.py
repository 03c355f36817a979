"""The KV cache that decoding keeps: keys and values of the tokens so far.

Where a window bounds what a layer sees, its places are a ring, and new tokens overwrite the oldest.

An array is named with the letters of its shape: segments_BT is [B, T].

Letters: L layers, B batch, S tokens, T places of a cache, J key-value heads, d head width; of
latent attention R rank, r channels of a key that carry its position.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.model.attention_cores import visible
from moejax.model.config import AttentionConfig

# Tokens for which a ring has room beside its window: as many can be written at once, or less one
# truncated.
AHEAD = 8


class KVCache(NamedTuple):
  """What decoding keeps of the tokens so far, for L layers that are alike.

  The token of slot s of a row lies at place s % T. A row is truncated to fewer tokens by lowering
  its `length`; what is written later overwrites. With a window, T may be less than the tokens seen,
  and then no more than AHEAD - 1 tokens can be truncated.
  All layers are in one array, so that a loop over them carries it: what is written then is a few
  tokens, in place.
  """

  # k and v, each [L, B, J, T, d]; or latent and rotated key together, [L, B, 1, T, R + r]
  entries: tuple[Array, ...]
  segments: Array  # [L, B, T] i32, 0 is padding
  length: Array  # [L, B] i32, slots filled
  layer: Array  # i32, the layer that the next `append` writes


def empty_cache(
  layers: int, batch: int, length: int, cfg: AttentionConfig, window: int, dtype: jnp.dtype
) -> KVCache:
  """Makes room for `length` tokens in each of `batch` rows, or for as many as the window needs."""
  room = min(length, window + AHEAD) if window else length
  if cfg.latent.kv_rank:
    widths = [(1, cfg.latent.kv_rank + cfg.latent.d_rope)]
  else:
    widths = [(cfg.num_kv_heads, cfg.d_head)] * 2
  return KVCache(
    entries=tuple(jnp.zeros((layers, batch, heads, room, width), dtype) for heads, width in widths),
    segments=jnp.zeros((layers, batch, room), jnp.int32),
    length=jnp.zeros((layers, batch), jnp.int32),
    layer=jnp.zeros((), jnp.int32),
  )


def slots_in_places(length_B: Array, room: int) -> Array:
  """The slot in each place of a cache, [B, T] i32: the last below `length` that lies there.

  A place that nothing was written to has a slot later than all, which no query sees.
  """
  last_B1 = length_B[:, None] - 1
  slots_BT = last_B1 - (last_B1 - jnp.arange(room)) % room
  return jnp.where(slots_BT < 0, jnp.iinfo(slots_BT.dtype).max, slots_BT)


def append(
  cache: KVCache, new_BSJd: tuple[Array, ...], segments_BS: Array, window: int
) -> tuple[KVCache, tuple[Array, ...], Array]:
  """Writes S tokens to the layer whose turn it is.

  Args:
    new_BSJd: keys and values, or whatever else `cache.entries` holds, in the same order.
    segments_BS: the document of each token, 0 for padding.

  Returns:
    The cache; the entries to attend to, each [B, T, J, d], or [B, T + S, J, d] where more tokens
    are written than a ring has room for; and the mask of which of them each query sees.
  """
  tokens, room, layer = segments_BS.shape[1], cache.segments.shape[-1], cache.layer
  length_B = cache.length[layer]
  slots_BS = length_B[:, None] + jnp.arange(tokens)
  # Of more tokens than places, only the last are written: no place is written twice.
  # Not by `vmap` over rows: XLA's CPU backend would copy all of the cache, to lay the axis of one
  # row elsewhere.
  rows_B1, places_BS = jnp.arange(slots_BS.shape[0])[:, None], slots_BS[:, -room:] % room
  written = tuple(
    old.at[layer, rows_B1, :, places_BS].set(a[:, -room:].astype(old.dtype))
    for old, a in zip(cache.entries, new_BSJd)
  )
  after = KVCache(
    entries=written,
    segments=cache.segments.at[layer, rows_B1, places_BS].set(segments_BS[:, -room:]),
    length=cache.length.at[layer].add(tokens),
    layer=layer,
  )
  if not window or tokens <= AHEAD:
    key_segments_BT = after.segments[layer]
    key_slots_BT = slots_in_places(length_B + tokens, room)
    mask = visible(segments_BS, key_segments_BT, slots_BS, key_slots_BT, window)
    return after, tuple(a[layer].swapaxes(1, 2) for a in after.entries), mask
  # So many tokens would overwrite on a ring what the first of them see: these are attended to
  # beside the cache as it was.
  entries = tuple(
    jnp.concatenate([old[layer].swapaxes(1, 2), a.astype(old.dtype)], 1)
    for old, a in zip(cache.entries, new_BSJd)
  )
  key_segments = jnp.concatenate([cache.segments[layer], segments_BS], 1)
  key_slots = jnp.concatenate([slots_in_places(length_B, room), slots_BS], 1)
  return after, entries, visible(segments_BS, key_segments, slots_BS, key_slots, window)
