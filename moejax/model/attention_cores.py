"""Softmax attention within documents, from q, k and v on: its mask, and one core per platform.

  name in a config -> row of ATTENTIONS -> what it comes to for these shapes: a row of CORES

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S queries, T keys, H heads, J key-value heads, G query heads of a key-value head,
d width of q and k, v of a value.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.model.cudnn_attention import (
  cudnn_packed,
  pad_channels,
  padded_width,
  supports_packed,
  widest_head,
)
from moejax.model.remat import ATTENTION
from moejax.model.splash_attention import splash, supports
from moejax.sharding.logical_axes import platform

CHUNKS, WINDOW_CHUNKS = 4, 16  # of queries: without a window, and at most with one


def visible(
  query_segments: Array, key_segments: Array, query_slots: Array, key_slots: Array, window: int
) -> Array:
  """Says which keys a query sees: of its own document, not later than itself, and within `window`.

  A padding query (segment 0) sees the padding before it, so that its softmax is defined; nobody
  reads the result.

  Args:
    query_segments, key_segments: [B, S] and [B, T] i32, the document of each token.
    query_slots, key_slots: the order of tokens in a row, [S] and [T], or for each row its own,
      [B, S] and [B, T].
    window: a query sees itself and window - 1 tokens before it; 0: any.

  Returns:
    [B, 1, S, T] bool.
  """
  query, key = query_slots[..., :, None], key_slots[..., None, :]
  seen = query >= key
  if window:
    seen &= query - key < window
  same_document_BST = query_segments[:, :, None] == key_segments[:, None, :]
  return (seen & same_document_BST)[:, None]


def softmax_with_sinks(scores_BJGST: Array, sinks_H: Array) -> Array:
  """Returns the softmax of [scores, sink] over keys without the sink's column, which is never made.

  sinks_H: one logit for each query head, H = J G.
  """
  sinks_JG11 = sinks_H.reshape(*scores_BJGST.shape[1:3], 1, 1)
  # The largest logit, the sink among them, is subtracted: no exp can then overflow. It cancels, and
  # so does its gradient.
  largest = jnp.maximum(scores_BJGST.max(-1, keepdims=True), sinks_JG11)
  largest_BJGS1 = jax.lax.stop_gradient(largest)
  weights_BJGST = jnp.exp(scores_BJGST - largest_BJGS1)
  total_BJGS1 = weights_BJGST.sum(-1, keepdims=True) + jnp.exp(sinks_JG11 - largest_BJGS1)
  return weights_BJGST / total_BJGS1


def attend(
  q_BSHd: Array,
  k_BTJd: Array,
  v_BTJv: Array,
  mask_B1ST: Array,
  scale: float,
  sinks: Array | None,
) -> Array:
  """Computes softmax attention; scores, softmax and both sums of products in float32.

  What is rounded to the dtype of v: the weights, once, and the result, once. A score of 16 in
  bfloat16 would be off by 1/32, and its weight by as large a part of itself.

  Args:
    q_BSHd, k_BTJd, v_BTJv: query head h reads key head h // (H / J).
    mask_B1ST: bool; every query must see something.
    scale: of the products of q and k.
    sinks: [H] f32, logits of one more key, which everybody sees and which has no value; None:
      without.

  Returns:
    [B, S, H, v] in the dtype of v.
  """
  b, s, h, d = q_BSHd.shape
  # The query heads of a key head are one more axis, so that keys are not repeated for each.
  q_BSJGd = q_BSHd.reshape(b, s, k_BTJd.shape[2], -1, d)
  scores_BJGST = scale * jnp.einsum(
    'bsjgd,btjd->bjgst', q_BSJGd, k_BTJd, preferred_element_type=jnp.float32
  )
  # Minus infinity and no large number: scores may be steeper than any number.
  scores_BJGST = jnp.where(mask_B1ST[:, :, None], scores_BJGST, -jnp.inf)
  if sinks is None:
    probs_BJGST = jax.nn.softmax(scores_BJGST, axis=-1)
  else:
    probs_BJGST = softmax_with_sinks(scores_BJGST, sinks)
  y_BSJGv = jnp.einsum(
    'bjgst,btjv->bsjgv',
    probs_BJGST.astype(v_BTJv.dtype),
    v_BTJv,
    preferred_element_type=jnp.float32,
  )
  return y_BSJGv.reshape(b, s, h, -1).astype(v_BTJv.dtype)


class Core(Protocol):
  """An implementation of softmax attention: a row of CORES, or of ATTENTIONS."""

  def __call__(
    self,
    q_BSHd: Array,
    k_BSJd: Array,
    v_BSJv: Array,
    segments_BS: Array,
    window: int,
    scale: float,
    sinks: Array | None,
  ) -> Array:
    """Returns [B, S, H, v]: see `attend` for q, k, v, scale and sinks, `visible` for the others."""


def chunked(
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  window: int,
  scale: float,
  sinks: Array | None,
) -> Array:
  """Attends with each chunk of queries to the keys that it can see; a row of CORES.

  For CPU: 4 chunks do 5/8 of the square's work.
  """
  length = q_BSHd.shape[1]
  chunks = CHUNKS
  if window:
    # Chunks of half a window, if so many may be: each then reads one window and a half of keys.
    chunks = min(WINDOW_CHUNKS, max(CHUNKS, 2 * length // window))
  # A set: where there are fewer tokens than chunks, some edges are the same.
  edges = sorted({length * i // chunks for i in range(chunks + 1)})
  slots_S = jnp.arange(length)

  def chunk(first: int, end: int) -> Array:
    oldest = max(0, first - window + 1) if window else 0  # that the first query sees
    queries, keys = slice(first, end), slice(oldest, end)
    mask = visible(
      segments_BS[:, queries], segments_BS[:, keys], slots_S[queries], slots_S[keys], window
    )
    return attend(q_BSHd[:, queries], k_BSJd[:, keys], v_BSJv[:, keys], mask, scale, sinks=sinks)

  return jnp.concatenate([chunk(first, end) for first, end in zip(edges, edges[1:])], axis=1)


def library(
  implementation: str,
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  window: int,
  scale: float,
  sinks: None,
) -> Array:
  """Calls `jax.nn.dot_product_attention` with a mask: 'xla' runs everywhere, 'cudnn' is a kernel.

  The kernel computes the whole square, and reads the mask as a bias of each score. Both want one
  width for q, k and v, cuDNN a multiple of 8: the rest is filled with zeros.
  """
  width = padded_width(q_BSHd, v_BSJv)
  q, k, v = (pad_channels(a, width) for a in (q_BSHd, k_BSJd, v_BSJv))
  slots_S = jnp.arange(q_BSHd.shape[1])
  mask = visible(segments_BS, segments_BS, slots_S, slots_S, window)
  y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
  return y[..., : v_BSJv.shape[-1]]


def with_named_output(attend_by: Core) -> Core:
  """Returns the core with its output named for remat policies: of one that is no kernel.

  A kernel's output is among its residuals, where it must be named, and not here once more.
  """

  @functools.wraps(attend_by)
  def named(*args: Array, **options: object) -> Array:
    return checkpoint_name(attend_by(*args, **options), ATTENTION)

  return named


# name -> core
CORES: dict[str, Core] = {
  'chunked': with_named_output(chunked),
  'cudnn of packed documents': cudnn_packed,
  'cudnn with a mask': functools.partial(library, 'cudnn'),
  'splash': splash,
  'xla': with_named_output(functools.partial(library, 'xla')),
}


def core_for(
  implementation: str, q_BSHd: Array, k_BSJd: Array, v_BSJv: Array, has_sinks: bool
) -> str:
  """Returns the row of CORES that a row of ATTENTIONS comes to.

  Args:
    implementation: a row of ATTENTIONS, or 'auto' for the best of the platform.
    q_BSHd, k_BSJd, v_BSJv: their shapes and dtype are looked at.
  """
  if implementation == 'auto':
    implementation = BEST_CORES[platform()]
  if implementation == 'splash':
    implementation = 'splash' if supports(q_BSHd, k_BSJd) else 'xla'
  if implementation in ('chunked', 'splash'):
    return implementation
  if has_sinks:  # which neither JAX's function nor its way to cuDNN's kernel knows
    return 'chunked'
  if implementation == 'cudnn':
    return cudnn_or_xla(q_BSHd, k_BSJd, v_BSJv)
  return implementation


def cudnn_or_xla(q_BSHd: Array, k_BSJd: Array, v_BSJv: Array) -> str:
  """Returns the row of CORES: cuDNN wants half precision, an even length and heads not too wide."""
  is_half = q_BSHd.dtype.itemsize == 2
  if not is_half or q_BSHd.shape[1] % 2 or padded_width(q_BSHd, v_BSJv) > widest_head():
    return 'xla'
  if supports_packed(q_BSHd, k_BSJd, v_BSJv):
    return 'cudnn of packed documents'
  return 'cudnn with a mask'


def attend_by(
  implementation: str,
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  window: int,
  scale: float,
  sinks: Array | None,
) -> Array:
  """Attends by what an implementation comes to for these shapes; see `core_for` and `Core`."""
  name = core_for(implementation, q_BSHd, k_BSJd, v_BSJv, has_sinks=sinks is not None)
  core = CORES[name]
  return core(q_BSHd, k_BSJd, v_BSJv, segments_BS, window=window, scale=scale, sinks=sinks)


# name -> core: what AttentionConfig.implementation may be
ATTENTIONS: dict[str, Core] = {
  name: functools.partial(attend_by, name) for name in ('chunked', 'cudnn', 'splash', 'xla')
}
# platform -> its row, for implementation 'auto'
BEST_CORES = {'cpu': 'chunked', 'gpu': 'cudnn', 'tpu': 'splash'}
