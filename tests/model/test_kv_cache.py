"""Decoding from a cache is the same attention, whatever is truncated; a cache holds no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.attention import Attention, LatentAttention
from moejax.model.config import AttentionConfig
from moejax.model.kv_cache import AHEAD, KVCache, empty_cache
from tests.model.attention_cases import (
  CONFIGS,
  POSITIONS,
  REAL,
  SEGMENTS,
  B,
  D,
  S,
  X,
  layer,
  output_of,
  window,
)
from tests.support.quick import QUICK


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def decode_in_pieces(
  cfg: AttentionConfig, pieces: tuple[int, ...], layer: Attention | LatentAttention, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  """y of all tokens from a cache: these pieces at once, then one by one."""
  done, first = [], 0

  def step(cache: KVCache, rows: tuple[jax.Array, ...]) -> tuple[KVCache, jax.Array]:
    y, cache = layer(*rows, cfg.windows[0], cache)
    return cache, y

  for size in pieces:
    cache, y = step(cache, tuple(a[:, first : first + size] for a in (X, SEGMENTS, POSITIONS)))
    done.append(y)
    first += size
  rest = tuple(a[:, first:].swapaxes(0, 1)[:, :, None] for a in (X, SEGMENTS, POSITIONS))
  cache, ones = jax.lax.scan(step, cache, rest)
  return jnp.concatenate([*done, ones[:, :, 0].swapaxes(0, 1)], 1), cache


@pytest.mark.parametrize('name', CONFIGS)
def test_decoding_from_the_cache_is_attending_at_once(name: str) -> None:
  """A prompt longer than a ring, a second longer than what a ring takes at once, and one by one.

  So the ring is gone round three times. What is in the places of an empty cache is never seen.
  """
  cfg = CONFIGS[name]
  pieces = (14, 10) if window(name) else (14,)
  cache = empty_cache(1, B, S + 4, cfg, cfg.windows[0], jnp.float32)
  y, filled = decode_in_pieces(cfg, pieces, layer(name), cache)
  np.testing.assert_allclose(y[REAL], output_of(name)[REAL], rtol=1e-4, atol=1e-4)
  assert (filled.length == S).all()
  assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, cache)
  entries = tuple(a + 1e4 for a in cache.entries)
  rubbish = cache._replace(entries=entries, segments=cache.segments + 1)
  again, _ = decode_in_pieces(cfg, pieces, layer(name), rubbish)
  np.testing.assert_array_equal(np.asarray(y)[REAL], np.asarray(again)[REAL])


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def decode_with_drafts(
  cfg: AttentionConfig, layer: Attention | LatentAttention, cache: KVCache, accepted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Each turn writes AHEAD tokens, keeps a row's first `accepted` [turns, B], and writes one more.

  Those truncated are rubbish. -> y and slots of the others and of the one,
  [turns, B, AHEAD + 1, ...].
  """
  x, segments, positions = (
    jnp.pad(a, ((0, 0), (0, 2 * AHEAD), *((0, 0),) * (a.ndim - 2)))
    for a in (X, SEGMENTS, POSITIONS)
  )

  def run(cache: KVCache, size: int, right: jax.Array) -> tuple[jax.Array, KVCache, jax.Array]:
    slots = cache.length[0][:, None] + jnp.arange(size)
    x_rows, *others = (jax.vmap(lambda a, s: a[s])(a, slots) for a in (x, segments, positions))
    wrong = jnp.arange(size) >= right[:, None]
    x_rows = jnp.where(wrong[..., None], 100.0, x_rows)
    y, cache = layer(x_rows, *others, cfg.windows[0], cache)
    return y, cache, slots

  def turn(cache: KVCache, accepted: jax.Array) -> tuple[KVCache, tuple[jax.Array, jax.Array]]:
    y, after, slots = run(cache, AHEAD, accepted)
    one, after, slot = run(after._replace(length=cache.length + accepted), 1, accepted)
    return after, (jnp.concatenate([y, one], 1), jnp.concatenate([slots, slot], 1))

  return jax.lax.scan(turn, cache, accepted)[1]


@pytest.mark.parametrize(
  'name', ['grouped', 'sinks', pytest.param('latent', marks=pytest.mark.slow)]
)
def test_tokens_taken_back_were_never_there(name: str) -> None:
  """Rows of one batch keep from 1 to all of what is written, also where a ring begins anew."""
  cfg = CONFIGS[name]
  cache = empty_cache(1, B, S + 2 * AHEAD, cfg, cfg.windows[0], jnp.float32)
  accepted = np.array([[1, 8], [4, 3], [7, 2], [2, 1], [5, 4], [8, 7], [3, 6]])
  y, slots = decode_with_drafts(cfg, layer(name), cache, accepted)
  seen = 0
  for turn, b, i in np.ndindex(*slots.shape):
    s = int(slots[turn, b, i])
    if (i < accepted[turn, b] or i == AHEAD) and s < S and REAL[b, s]:
      seen += 1
      np.testing.assert_allclose(
        y[turn, b, i], output_of(name)[b, s], rtol=1e-4, atol=1e-4, err_msg=f'{turn=} {b=} {s=}'
      )
  assert seen == REAL.sum()


@pytest.mark.slow
def test_a_cache_holds_what_its_kind_needs_and_no_more() -> None:
  def shapes(name: str, length: int, window: int) -> list[tuple[int, ...]]:
    cache = empty_cache(2, 3, length, CONFIGS[name], window, jnp.bfloat16)
    assert all(a.dtype == jnp.bfloat16 for a in cache.entries)
    assert cache.segments.shape == (2, 3, cache.entries[0].shape[3])
    assert cache.length.shape == (2, 3)
    return [a.shape for a in cache.entries]

  assert shapes('grouped', 40, 0) == [(2, 3, 2, 40, D)] * 2
  assert shapes('sinks', 40, 3) == [(2, 3, 2, 3 + AHEAD, D)] * 2
  assert shapes('sinks', 5, 3) == [(2, 3, 2, 5, D)] * 2
  assert shapes('latent queries', 40, 0) == [(2, 3, 1, 40, 10 + 4)], 'nothing for each head'
