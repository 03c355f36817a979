"""Sets of tokens: counting in them, adding up over them, and what part of the whole batch's sets a micro-batch holds.

A balance loss is a mean over sets. A set is a document, or the rows of a micro-batch, of an expert-parallel group, of
the whole batch; it may be larger than the micro-batch at hand.

Letters: B batch, S sequence, E experts, K experts per token, G sets, A micro-batches of one step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Scope(NamedTuple):
  """The switches of a balance loss, and what it must know to be a part of the whole batch's loss.

  rows: rows of the global batch in one set; 0: all rows at hand.
  partition: what is balanced: 0: experts; M: M groups of neighbouring experts (devices, nodes).
  assignment: what f counts: 'unbiased', the top-K of the scores alone (DeepSeek-V3 eq. 18), 'dispatched', or 'first',
    each token's best expert (GShard).
  probability: '': P is the router's own scores, normalised; else a row of SCORE_FNS that makes P from the logits.
  running: `whole` lacks the micro-batch at hand, which is added to it (the buffer of 2501.11873, Algorithm 1).
  whole: [E] f32, what `BalanceLoss.seen` sums over the whole set, when part of it lies in other micro-batches.
  """

  rows: int = 0
  partition: int = 0
  assignment: str = 'unbiased'
  probability: str = ''
  running: bool = False
  whole: Array | None = None


def assignment_matrix(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """M_te, 1 where token t is given to expert e, 0 for tokens that do not count; id E is nobody's. [B, S, E] f32."""
  chosen = jax.nn.one_hot(expert_ids, num_experts, dtype=jnp.float32).sum(2)
  return chosen * mask[..., None]


def expert_load(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """Copies that go to each expert, of tokens that count. [B, S, K], [B, S] -> [E] f32."""
  return assignment_matrix(expert_ids, mask, num_experts).sum((0, 1))


def document_sums(values: Array, segments: Array) -> Array:
  """Sums over each (row, segment). [B, S, n] -> [B * (S + 1), n]; documents that are not there sum to 0."""
  num_segments = segments.shape[1] + 1
  sums = jax.vmap(lambda v, ids: jax.ops.segment_sum(v, ids, num_segments))(values, segments)
  return sums.reshape(-1, values.shape[-1])


def row_sums(values: Array, rows: int) -> Array:
  """Sums over each run of `rows` rows; 0, or more than there are: one set. [B, S, n] -> [G, n]."""
  sets = max(1, values.shape[0] // rows) if rows else 1
  return values.reshape(sets, -1, values.shape[-1]).sum(1)


def parts_of_set(rows: int, micro_rows: int) -> int:
  """How many micro-batches of `micro_rows` rows one set of `rows` rows is spread over."""
  return max(1, rows // micro_rows)


def token_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over tokens: each micro-batch by its tokens. [A, b, S, 1] -> [A]."""
  del segments, scope
  return tokens.sum((1, 2, 3))


def document_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over documents: each micro-batch by its documents."""
  del scope
  return jax.vmap(lambda t, s: (document_sums(t, s) > 0).sum())(tokens, segments).astype(
    jnp.float32
  )


def row_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over sets of rows: each micro-batch by its sets, or by its tokens in the set that it is a part of."""
  del segments
  parts = parts_of_set(scope.rows, tokens.shape[1])
  if parts == 1:
    return jax.vmap(lambda t: (row_sums(t, scope.rows) > 0).sum())(tokens).astype(jnp.float32)
  per_set = tokens.sum((1, 2, 3)).reshape(-1, parts)  # [sets, micro-batches of a set]
  return (per_set / jnp.maximum(per_set.sum(1, keepdims=True), 1.0)).reshape(-1)


def even_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """As `row_parts`, but the micro-batches of one set share it evenly: for a loss that is not linear in its tokens."""
  parts = parts_of_set(scope.rows, tokens.shape[1])
  if parts == 1:
    return row_parts(tokens, segments, scope)
  per_set = tokens.sum((1, 2, 3)).reshape(-1, parts).sum(1) > 0
  return jnp.repeat(per_set / parts, parts)
