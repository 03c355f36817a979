"""Decoding, as it is compiled: prefill, and one step that gives each row its next tokens.

  chunk -> model with its caches -> a token drawn after each of the chunk's -> those drafts of the
  chunk that are what was drawn, and one token more -> caches truncated to them -> drafts for the
  next chunk, by the blocks of multi-token prediction

Speculation is exact: what is drawn after a token follows from the tokens before it, the seed, the
row and the place alone, and a draft is accepted only if it is what is drawn (Leviathan et al.
2211.17192, for drafts that are certain of themselves: each is right as often as the model gives it
probability). Text differs from that of one token a step only where sums of another order decide:
two tokens, or two experts, all but equal.

An array is named with the letters of its shape: hidden_BCD is [B, C, D].

Letters: B batch, C tokens of a chunk, P of a prompt, D model, V vocab, G drafts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch, make_batch
from moejax.inference.draw import SamplingParams, draw
from moejax.model.kv_cache import AHEAD, KVCache
from moejax.model.layer_stack import Caches
from moejax.model.transformer import Transformer
from moejax.sharding.logical_axes import constrain, replicated

# The last depth writes twice as many tokens at once as there are drafts, and a ring takes AHEAD.
MAX_DRAFTS = AHEAD // 2


class Decoding(NamedTuple):
  """State between decoding steps. All known tokens but the last are in the caches.

  Slot s of the cache of depth k = 1, 2.. of multi-token prediction is place s - k + 1 of the row:
  where the token ahead is that of slot s + 1, as it is for the model itself. So all caches have the
  same length.
  """

  chunk: Array  # [B, 1 + G], the last known token and drafts of the next
  starts: Array  # [B], the slot of each row's first token; before it is padding
  caches: Caches
  # [B, G - 1, D], of each depth but the last: at the last place whose token ahead is known
  hidden: Array


class Verified(NamedTuple):
  """What the model says of a chunk."""

  hidden: Array  # [B, C, D]
  following: Array  # [B, C], the token drawn after each
  accepted: Array  # [B], how many of the chunk's drafts are what was drawn


def num_drafts(caches: Caches) -> int:
  """G, as many as there are caches for."""
  return len(caches['mtp']) if 'mtp' in caches else 0


@functools.partial(jax.jit, donate_argnums=3)
def prefill(
  model: Transformer,
  router: Array,
  prompts: Array,
  caches: Caches,
  starts: Array,
  params: SamplingParams,
) -> tuple[Decoding, Array]:
  """Runs prompts with empty caches.

  Args:
    router: the bias of each MoE layer, as of `Transformer.__call__`.
    prompts: [B, P], padded on the left.
    starts: [B], the slot of each row's first token.

  Returns:
    What `step` wants, and the first tokens [B].
  """
  prompts_BP, starts_B = prompts, starts
  rows, alive_B = prompts_BP.shape[0], jnp.ones_like(starts_B, jnp.bool_)
  looked_back = jnp.zeros(
    (rows, max(0, num_drafts(caches) - 1), model.cfg.d_model), model.cfg.dtype
  )
  state = Decoding(prompts_BP, starts_B, caches, looked_back)
  batch = decoding_batch(prompts_BP, jnp.zeros_like(starts_B), starts_B, alive_B)
  out = model(batch, router, caches)
  # Logits of the last token alone: of all P they would be the largest array there is.
  last_logits_B1V = model.logits(out.hidden[:, -1:])
  last_B1 = draw(last_logits_B1V, batch.positions[:, -1:] + 1, params)
  state = state._replace(caches=caches | out.cache)
  # A prompt is a chunk whose drafts are all right.
  following_BP = jnp.concatenate([prompts_BP[:, 1:], last_B1], 1)
  accepted_B = jnp.full_like(starts_B, prompts_BP.shape[1] - 1)
  verified = Verified(out.hidden, following_BP, accepted_B)
  return accept_drafts(model, router, state, verified, alive_B), replicated(last_B1[:, 0])


@functools.partial(jax.jit, donate_argnums=2)
def step(
  model: Transformer, router: Array, state: Decoding, alive: Array, params: SamplingParams
) -> tuple[Decoding, Array, Array]:
  """Verifies the drafts of a chunk, and drafts the next.

  alive: [B] bool; other rows are padding, and stay as they are.

  Returns:
    The next state, tokens [B, 1 + G], and how many of them count [B].
  """
  chunk_BC, alive_B = state.chunk, alive
  batch = decoding_batch(chunk_BC, cache_length(state.caches), state.starts, alive_B)
  out = model(batch, router, state.caches)
  following_BC = draw(model.logits(out.hidden), batch.positions + 1, params)
  agreed_BG = (following_BC[:, :-1] == chunk_BC[:, 1:]).astype(jnp.int32)
  # Up to the first that is wrong: those after it were drafted from a text that is not the row's.
  accepted_B = jnp.cumprod(agreed_BG, axis=1).sum(1)
  state = state._replace(caches=state.caches | out.cache)
  verified = Verified(out.hidden, following_BC, accepted_B)
  state = accept_drafts(model, router, state, verified, alive_B)
  return state, *replicated((following_BC, accepted_B + 1))


def accept_drafts(
  model: Transformer, router: Array, state: Decoding, verified: Verified, alive: Array
) -> Decoding:
  """Returns the state once the first accepted + 1 tokens of `verified.following` are the row's.

  Args:
    state: its caches hold the whole chunk; their length is what it was before the chunk, and here
      becomes that of the known tokens but the last.
    alive: [B] bool; the caches of other rows keep their length.
  """
  hidden_BCD, accepted_B = verified.hidden, verified.accepted
  rows_B, drafts = jnp.arange(hidden_BCD.shape[0]), num_drafts(state.caches)
  first_B = cache_length(state.caches) - hidden_BCD.shape[1]
  # Room behind for drafts; each is written after the tokens that its row accepted.
  known = jnp.pad(verified.following, ((0, 0), (0, drafts)))  # [B, C + G]
  mtp_caches, looked_back = [], []
  for depth in range(drafts):
    # A depth begins where it last did not know the token ahead, and goes again over what it had
    # drafted. A router that goes by token ids is given those ahead, not the places' own as in
    # training: it costs drafts, not correctness.
    if depth:
      before_B1D = state.hidden[:, depth - 1 : depth]
      hidden_BCD = jnp.concatenate([before_B1D, hidden_BCD], 1)  # C is one more with each depth
    ahead_BC = known[:, : hidden_BCD.shape[1]]
    batch = decoding_batch(ahead_BC, first_B - depth, state.starts, alive)
    hidden_BCD, cache = model.draft(
      depth, hidden_BCD, ahead_BC, batch, router, cache=state.caches['mtp'][depth]
    )
    last_B1D = hidden_BCD[rows_B, accepted_B + depth][:, None]
    draft_B = model.logits(last_B1D)[:, 0].argmax(-1)
    known = known.at[rows_B, accepted_B + depth + 1].set(draft_B.astype(jnp.int32))
    mtp_caches.append(cache)
    looked_back.append(hidden_BCD[rows_B, accepted_B])
  caches = state.caches | ({'mtp': tuple(mtp_caches)} if drafts else {})
  length_B = first_B + jnp.where(alive, accepted_B + 1, 0)
  truncated = {}
  for stack, stack_caches in caches.items():
    truncated[stack] = tuple(truncate_cache(cache, length_B) for cache in stack_caches)
  chunk_BC = jnp.take_along_axis(known, accepted_B[:, None] + jnp.arange(drafts + 1), axis=1)
  # With one draft or none, no depth looks back: the array is empty and stays.
  next_hidden = jnp.stack(looked_back[:-1], 1) if drafts > 1 else state.hidden
  return Decoding(chunk_BC, state.starts, truncated, constrain(next_hidden, 'batch', '', ''))


def decoding_batch(tokens_BC: Array, first_B: Array, starts_B: Array, alive_B: Array) -> Batch:
  """Makes a Batch of tokens from slot `first` on, of rows that begin at slot `starts`.

  What is before that, and all of rows that are not alive, is padding.
  """
  positions_BC = (first_B - starts_B)[:, None] + jnp.arange(tokens_BC.shape[1])
  segments_BC = ((positions_BC >= 0) & alive_B[:, None]).astype(jnp.int32)
  return make_batch(tokens_BC, segment_ids=segments_BC, positions=jnp.maximum(positions_BC, 0))


def cache_length(caches: Caches) -> Array:
  """Returns the slots filled of each row, [B]: all layers are alike."""
  return caches['layers'][0].length[0]


def truncate_cache(cache: KVCache, length_B: Array) -> KVCache:
  """Returns a cache with only `length` slots of each row filled.

  It is laid out by rule: on a mesh, another layout would be another program.
  """
  entries = []
  for entry in cache.entries:
    # The one head of a latent cache is whole on every device.
    heads = 'heads' if entry.shape[2] > 1 else ''
    axes = ('', 'batch', heads, '', '')
    entries.append(constrain(entry, *axes))
  return cache._replace(
    entries=tuple(entries),
    segments=constrain(cache.segments, '', 'batch', ''),
    length=jnp.broadcast_to(length_B, cache.length.shape),
  )
