"""Decoding, as it is compiled: prefill, and one step that gives the next token of each row, or several of them.

  chunk -> model with its caches -> a token drawn after each of the chunk's -> those that the chunk had guessed, and
  one more -> caches taken back to them -> guesses for the next chunk, by the blocks of multi-token prediction

Speculation is exact: what is drawn after a token follows from the tokens before it, the seed, the row and the place
alone, and a guess counts only if it is what is drawn (Leviathan et al. 2211.17192, for guesses that are certain of
themselves: each is right as often as the model gives it probability). Text differs from that of one token a step
only where sums of another order decide: two tokens, or two experts, all but equal.

Letters: B batch, C tokens of a chunk, P of a prompt, D model, V vocab, G guesses.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch, make_batch
from moejax.model.kv_cache import AHEAD, KVCache
from moejax.model.transformer import Caches, Transformer
from moejax.sharding.logical_axes import constrain, replicated

# The last depth writes twice as many tokens at once as there are guesses, and a ring takes AHEAD.
MOST_GUESSES = AHEAD // 2


class Drawing(NamedTuple):
  """How a token is drawn from logits; arrays, so that other values are no other program."""

  key: Array
  temperature: Array  # 0: the likeliest
  top_k: Array  # i32; 0: all
  top_p: Array


class Decoding(NamedTuple):
  """What a step leaves to the next. All known tokens but the last are in the caches.

  Slot s of the cache of depth k = 1, 2.. of multi-token prediction is place s - k + 1 of the row: where the token
  ahead is that of slot s + 1, as it is for the model itself. So all caches have the same length.
  """

  chunk: Array  # [B, 1 + G], the last known token and guesses of the next
  starts: Array  # [B], the slot of each row's first token; before it is padding
  caches: Caches
  hidden: (
    Array  # [B, G - 1, D], of each depth but the last: at the last place whose token ahead is known
  )


def guesses(caches: Caches) -> int:
  """G, as many as there are caches for."""
  return len(caches['mtp']) if 'mtp' in caches else 0


@functools.partial(jax.jit, donate_argnums=3)
def prefill(
  model: Transformer, router: Array, prompts: Array, caches: Caches, starts: Array, drawing: Drawing
) -> tuple[Decoding, Array]:
  """Runs prompts [B, P] padded on the left with empty caches. -> what `step` wants, and the first tokens [B]."""
  rows, alive = prompts.shape[0], jnp.ones_like(starts, jnp.bool_)
  looked_back = jnp.zeros((rows, max(0, guesses(caches) - 1), model.cfg.d_model), model.cfg.dtype)
  state = Decoding(prompts, starts, caches, looked_back)
  batch = decoding_batch(prompts, jnp.zeros_like(starts), starts, alive)
  out = model(batch, router, caches)
  last = draw(model.logits(out.hidden[:, -1:]), batch.positions[:, -1:] + 1, drawing)
  state = state._replace(caches=caches | out.cache)
  following = jnp.concatenate([prompts[:, 1:], last], 1)
  accepted = jnp.full_like(starts, prompts.shape[1] - 1)
  return accept_drafts(model, router, state, out.hidden, following, accepted, alive), replicated(
    last[:, 0]
  )


@functools.partial(jax.jit, donate_argnums=2)
def step(
  model: Transformer, router: Array, state: Decoding, alive: Array, drawing: Drawing
) -> tuple[Decoding, Array, Array]:
  """-> the next state, tokens [B, 1 + G], and how many of them count [B]. Rows not `alive` are padding, and stay."""
  chunk = state.chunk
  batch = decoding_batch(chunk, cache_length(state.caches), state.starts, alive)
  out = model(batch, router, state.caches)
  following = draw(model.logits(out.hidden), batch.positions + 1, drawing)
  agreed = (following[:, :-1] == chunk[:, 1:]).astype(jnp.int32)
  accepted = jnp.cumprod(agreed, axis=1).sum(1)
  state = state._replace(caches=state.caches | out.cache)
  state = accept_drafts(model, router, state, out.hidden, following, accepted, alive)
  return state, *replicated((following, accepted + 1))


def accept_drafts(
  model: Transformer,
  router: Array,
  state: Decoding,
  hidden: Array,
  following: Array,
  accepted: Array,
  alive: Array,
) -> Decoding:
  """The state once it is known which tokens follow: the first accepted + 1 of following [B, C].

  hidden [B, C, D] is what the model gave for the chunk. state.caches hold the whole chunk; their length is what it was
  before, and here becomes that of the known tokens but the last.
  """
  rows, count = jnp.arange(hidden.shape[0]), guesses(state.caches)
  first = cache_length(state.caches) - hidden.shape[1]
  known = jnp.pad(following, ((0, 0), (0, count)))
  kept, looked_back = [], []
  for depth in range(count):
    # A depth begins where it last did not know the token ahead, and goes again over what it had guessed. A router that
    # goes by token ids is given those ahead, not the places' own as in training: it costs guesses, not correctness.
    if depth:
      hidden = jnp.concatenate([state.hidden[:, depth - 1 : depth], hidden], 1)  # [B, C + depth, D]
    ahead = known[:, : hidden.shape[1]]
    batch = decoding_batch(ahead, first - depth, state.starts, alive)
    hidden, cache = model.draft(depth, hidden, ahead, batch, router, state.caches['mtp'][depth])
    guess = model.logits(hidden[rows, accepted + depth][:, None])[:, 0].argmax(-1)
    known = known.at[rows, accepted + depth + 1].set(guess.astype(jnp.int32))
    kept, looked_back = [*kept, cache], [*looked_back, hidden[rows, accepted]]
  caches = state.caches | ({'mtp': tuple(kept)} if count else {})
  length = first + jnp.where(alive, accepted + 1, 0)
  caches = {
    stack: tuple(truncate_cache(cache, length) for cache in turn) for stack, turn in caches.items()
  }
  chunk = jnp.take_along_axis(known, accepted[:, None] + jnp.arange(count + 1), axis=1)
  looking_back = jnp.stack(looked_back[:-1], 1) if count > 1 else state.hidden
  return Decoding(chunk, state.starts, caches, constrain(looking_back, 'batch', '', ''))


def decoding_batch(tokens: Array, first: Array, starts: Array, alive: Array) -> Batch:
  """Tokens [B, C] from slot `first` [B] on, of rows that begin at slot `starts`; before that is padding."""
  positions = (first - starts)[:, None] + jnp.arange(tokens.shape[1])
  segments = ((positions >= 0) & alive[:, None]).astype(jnp.int32)
  return make_batch(tokens, segment_ids=segments, positions=jnp.maximum(positions, 0))


def cache_length(caches: Caches) -> Array:
  """Slots filled of each row, [B]: all layers are alike."""
  return caches['blocks'][0].length[0]


def truncate_cache(cache: KVCache, length: Array) -> KVCache:
  """With only `length` [B] slots filled. Laid out by rule: on a mesh, another layout would be another program."""
  entries = tuple(
    constrain(a, '', 'batch', 'heads' if a.shape[2] > 1 else '', '', '') for a in cache.entries
  )
  return cache._replace(
    entries=entries,
    segments=constrain(cache.segments, '', 'batch', ''),
    length=jnp.broadcast_to(length, cache.length.shape),
  )


def draw(logits: Array, places: Array, drawing: Drawing) -> Array:
  """A token from each place's logits [B, C, V]; the same for the same row and place in it [B, C]. [B, C] i32."""
  rows = jnp.broadcast_to(jnp.arange(places.shape[0])[:, None], places.shape)
  keys = jax.vmap(
    lambda row, place: jax.random.fold_in(jax.random.fold_in(drawing.key, row), place)
  )(rows.reshape(-1), places.reshape(-1))
  flat = logits.reshape(-1, logits.shape[-1])
  drawn = jax.lax.cond(
    drawing.temperature > 0,
    functools.partial(sampled, keys=keys, drawing=drawing),
    lambda logits: logits.argmax(-1),
    flat,
  )
  return drawn.reshape(places.shape).astype(jnp.int32)


def sampled(logits: Array, keys: Array, drawing: Drawing) -> Array:
  """[N, V] -> [N]: of the top_k likeliest, the fewest that have the probability top_p (Holtzman et al. 2020)."""
  logits = logits / drawing.temperature
  for on, weigh, amount in (
    (drawing.top_k > 0, jnp.ones_like, drawing.top_k),
    (drawing.top_p < 1, jax.nn.softmax, drawing.top_p),
  ):
    logits = jnp.where(foremost(logits, weigh(logits), amount, on), logits, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys, logits)


def foremost(x: Array, weights: Array, amount: Array, on: Array) -> Array:
  """The largest entries of each row whose weights reach `amount`, and their ties; all if not `on`. [N, V] bool.

  The least of them is found bit by bit, in 32 passes: a sort of a large vocabulary takes ten times as long.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  rank = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # in the order of x

  def bit(i: Array, least: Array) -> Array:
    higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    reached = jnp.where(rank >= higher, weights, 0).sum(-1, keepdims=True) >= amount
    return jnp.where(reached, higher, least)

  return rank >= jax.lax.fori_loop(0, jnp.where(on, 32, 0), bit, jnp.zeros_like(rank[:, :1]))
