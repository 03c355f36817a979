"""Sets of tokens: sums over them, and which part of the whole batch's sets a micro-batch holds.

A balance loss is a mean over sets. A set is a document, or the rows of a micro-batch, of an
expert-parallel group, of the whole batch; it may be larger than the micro-batch at hand.

Names of arrays end in their shape: `mask_BS` is [B, S]. Letters: B rows of the batch, or of one
micro-batch; S sequence, E experts, K experts per token, G sets, A micro-batches of one step, N any
last axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Scope(NamedTuple):
  """The switches of a balance loss, and what it must know to be a part of the whole batch's loss.

  rows: rows of the global batch in one set; 0: all rows at hand.
  partition: what is balanced: 0: experts; M: M groups of neighbouring experts (devices, nodes).
  assignment: what f counts: 'unbiased', the top-K of the scores alone (DeepSeek-V3 eq. 18),
    'dispatched', or 'first', each token's best expert (GShard).
  probability: '': P is the router's own scores, normalised; else a row of SCORE_FNS that makes P
    from the logits.
  running: `whole` lacks the micro-batch at hand, which is added to it (the buffer of 2501.11873,
    Algorithm 1).
  whole: [E], what `BalanceLoss.seen` sums over the whole set, when part of it lies in other
    micro-batches: counts i32, or sums f32.
  """

  rows: int = 0
  partition: int = 0
  assignment: str = 'unbiased'
  probability: str = ''
  running: bool = False
  whole: Array | None = None


def zero_padding(values: Array, mask: Array) -> Array:
  """Returns `values` [B, S, ...] with 0 where `mask` [B, S] is False.

  By `where`, never by a product with the mask: 0 times NaN is NaN, in the value and in the
  gradient.
  """
  return jnp.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0)


def put_at_experts(values_BSK: Array, expert_ids_BSK: Array, num_experts: int) -> Array:
  """Returns each copy's value in the column of its expert, 0 elsewhere. [..., S, E].

  Scattered: a product with a one-hot of the ids would need [..., S, K, E].

  Args:
    values_BSK: [..., S, K] of any dtype; values at the same expert of a token are added.
    expert_ids_BSK: [..., S, K] integers; outside [0, num_experts) for an unassigned copy, whose
      value goes nowhere.
    num_experts: E.
  """
  # Of a negative id, an index would count from the end.
  is_assigned = expert_ids_BSK >= 0
  columns = jnp.where(is_assigned, expert_ids_BSK, num_experts)

  def row(values_K: Array, columns_K: Array) -> Array:
    # `zeros_like` of values: in `shard_map` they vary over the same mesh axes.
    none_E = jnp.zeros_like(values_K, shape=(num_experts,))
    return none_E.at[columns_K].add(values_K, mode='drop')

  for _ in range(columns.ndim - 1):
    # One axis at a time, so that a split batch axis stays where it is.
    row = jax.vmap(row)
  return row(values_BSK, columns)


def chosen_mask(expert_ids_BSK: Array, num_experts: int) -> Array:
  """Returns which experts each token has among its K. [..., S, K] integers -> [..., S, E] bool."""
  all_E = jnp.arange(num_experts, dtype=expert_ids_BSK.dtype)
  is_chosen_BSE = jnp.zeros((*expert_ids_BSK.shape[:-1], num_experts), jnp.bool_)
  # One choice after the other, which compiles to one pass: a one-hot would be [..., S, K, E].
  for k in range(expert_ids_BSK.shape[-1]):
    is_chosen_BSE = is_chosen_BSE | (expert_ids_BSK[..., k, None] == all_E)
  return is_chosen_BSE


def masked_ids(expert_ids_BSK: Array, mask_BS: Array, num_experts: int) -> Array:
  """Returns the ids [B, S, K] with those of tokens that are masked out unassigned: E."""
  return jnp.where(mask_BS[..., None], expert_ids_BSK, num_experts)


def row_loads(expert_ids_BSK: Array, mask_BS: Array, num_experts: int) -> Array:
  """Returns how many copies of each row go to each expert, of tokens that count. [B, E] i32."""
  ids_BSK = masked_ids(expert_ids_BSK, mask_BS, num_experts)
  # A row's copies as those of one token; rows stay apart, since a mesh splits them.
  ids_BN = ids_BSK.reshape(ids_BSK.shape[0], -1)
  return put_at_experts(jnp.ones_like(ids_BN, dtype=jnp.int32), ids_BN, num_experts)


def expert_load(expert_ids_BSK: Array, mask_BS: Array, num_experts: int) -> Array:
  """Returns how many copies go to each expert, [E] i32, of the tokens that are not masked out."""
  return row_loads(expert_ids_BSK, mask_BS, num_experts).sum(0)


class DocumentCounts(NamedTuple):
  """What each token's own document holds, of tokens that count."""

  experts: Array  # [B, S, E] i32, copies at each expert
  copies: Array  # [B, S] i32, of all experts
  tokens: Array  # [B, S] i32
  documents: Array  # scalar i32, of the batch: those with a token


def document_counts(
  expert_ids_BSK: Array, mask_BS: Array, segments_BS: Array, num_experts: int
) -> DocumentCounts:
  """Counts copies and tokens of each document, which is a (row, segment), and tells each token.

  In integers, so exactly. A sum over documents of what is made of counts and of sums over tokens is
  a sum over tokens: only counts need room for each of the S + 1 documents that a row may have.
  """
  ids_BSK = masked_ids(expert_ids_BSK, mask_BS, num_experts)
  segments_BS = ids_in_range(segments_BS)

  def of_row(ids_SK: Array, mask_S: Array, segments_S: Array) -> tuple[Array, ...]:
    # Segment 0 is padding and a row holds at most S documents. A shape under jit cannot be the
    # number of documents that there are, so it is the number that there can be.
    room = segments_S.shape[0] + 1
    is_copy_SK = ((ids_SK >= 0) & (ids_SK < num_experts)).astype(jnp.int32)
    columns_SK = jnp.where(is_copy_SK > 0, ids_SK, num_experts)
    nothing = jnp.zeros((room, num_experts), jnp.int32)
    experts = nothing.at[segments_S[:, None], columns_SK].add(1, mode='drop')
    copies = jnp.zeros(room, jnp.int32).at[segments_S].add(is_copy_SK.sum(1), mode='drop')
    tokens = jnp.zeros(room, jnp.int32).at[segments_S].add(mask_S.astype(jnp.int32), mode='drop')
    return experts[segments_S], copies[segments_S], tokens[segments_S], (tokens > 0).sum()

  experts, copies, tokens, documents = jax.vmap(of_row)(ids_BSK, mask_BS, segments_BS)
  return DocumentCounts(experts, copies, tokens, documents.sum())


class ExactMean(NamedTuple):
  """The mean of counts as a whole number and a fraction: `whole + rest / E`, 0 <= rest < E."""

  whole: Array  # [...]
  rest: Array  # [...]


def exact_mean(load: Array) -> ExactMean:
  """Returns the mean over experts of counts [..., E], in the dtype of the counts.

  Of i32 it is exact for all counts below 2^31, whatever they add up to: neither their sum nor E
  times a count is made. It also takes NumPy arrays.
  """
  xp, experts = load.__array_namespace__(), load.shape[-1]
  wholes, rests = xp.divmod(load, experts)
  # Sums of E numbers that are each divided by E, or below E.
  more, rest = xp.divmod(rests.sum(axis=-1, dtype=load.dtype), experts)
  return ExactMean(wholes.sum(axis=-1, dtype=load.dtype) + more, rest)


def total_of(mean: ExactMean, experts: int) -> Array:
  """Returns the sum of counts, which int32 may not hold, from their mean. [...] f32."""
  return experts * mean.whole.astype('float32') + mean.rest.astype('float32')


def document_sums(values_BSN: Array, segments_BS: Array) -> Array:
  """Sums over each document, which is a (row, segment): [B * (S + 1), N].

  Every row has room for S + 1 documents; those that do not exist sum to 0.
  """
  # Segment 0 is padding and a row holds at most S documents. A shape under jit cannot be the number
  # of documents that there are, so it is the number that there can be.
  num_segments = segments_BS.shape[1] + 1
  segments_BS = ids_in_range(segments_BS)

  def sums_of_row(values_SN: Array, segments_S: Array) -> Array:
    return jax.ops.segment_sum(values_SN, segments_S, num_segments)

  sums = jax.vmap(sums_of_row)(values_BSN, segments_BS)  # [B, S + 1, N]
  return sums.reshape(-1, values_BSN.shape[-1])


def ids_in_range(segments_BS: Array) -> Array:
  """Returns ids of documents from 0 to S: those of a row that has others are counted from 1.

  A sum by segment leaves out ids past its last one without a word, and other pipelines number
  documents through a whole corpus. A document lies in one piece of its row, but for padding; only
  rows whose ids are out of range are counted anew, the others stay as they are.
  """
  columns_S = jnp.arange(segments_BS.shape[1])
  is_real_BS = segments_BS != 0
  last_BS = jax.lax.cummax(jnp.where(is_real_BS, columns_S, -1), axis=1)
  before_BS = jnp.pad(last_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)  # -1: none
  previous_BS = jnp.take_along_axis(segments_BS, jnp.maximum(before_BS, 0), axis=1)
  begins_BS = is_real_BS & ((before_BS < 0) | (segments_BS != previous_BS))
  counted_BS = jnp.where(is_real_BS, jnp.cumsum(begins_BS, axis=1), 0).astype(segments_BS.dtype)
  in_range_BS = (segments_BS >= 0) & (segments_BS <= segments_BS.shape[1])
  return jnp.where(in_range_BS.all(1, keepdims=True), segments_BS, counted_BS)


def row_sets(rows: int, rows_at_hand: int) -> int:
  """Returns how many sets of `rows` rows are at hand; 0: all of them are one set.

  1 also where they are a part of one set.

  Raises:
    ValueError: sets of so many rows, and the rows at hand, are no whole number of each other.
  """
  if rows == 0:
    return 1
  larger, smaller = max(rows, rows_at_hand), min(rows, rows_at_hand)
  if rows < 0 or (smaller and larger % smaller):
    raise ValueError(
      f'rows={rows} of a balance set with {rows_at_hand} rows at hand: use a divisor or a multiple '
      f'of {rows_at_hand}, or rows=0, all of them'
    )
  return max(1, rows_at_hand // rows)


def row_sums(values_BSN: Array, rows: int) -> Array:
  """Sums over each run of `rows` rows, [G, N]; 0, or more rows than there are: one set."""
  sets = row_sets(rows, values_BSN.shape[0])
  return values_BSN.reshape(sets, -1, values_BSN.shape[-1]).sum(1)


def parts_of_set(rows: int, micro_rows: int) -> int:
  """Returns over how many micro-batches of `micro_rows` rows a set of `rows` rows is spread."""
  row_sets(rows, micro_rows)  # refuses what does not divide
  return max(1, rows // micro_rows)


# What follows gives the weight of each micro-batch [A] in a loss of the whole batch, before
# division by their sum. `tokens_ABS1` is 1 for tokens that count, i32; arguments are those of
# `BalanceLoss.parts`.


def token_parts(tokens_ABS1: Array, segments_ABS: Array, scope: Scope) -> Array:
  """Weighs micro-batches for a mean over tokens: each by its number of tokens. [A] i32."""
  del segments_ABS, scope
  return tokens_ABS1.sum((1, 2, 3))


def document_parts(tokens_ABS1: Array, segments_ABS: Array, scope: Scope) -> Array:
  """Weighs micro-batches for a mean over documents: each by its number of documents. [A] f32.

  Only documents with a token that counts are counted.
  """
  del scope

  def documents(tokens_BS1: Array, segments_BS: Array) -> Array:
    return (document_sums(tokens_BS1, segments_BS) > 0).sum()

  return jax.vmap(documents)(tokens_ABS1, segments_ABS).astype(jnp.float32)


def row_parts(tokens_ABS1: Array, segments_ABS: Array, scope: Scope) -> Array:
  """Weighs micro-batches for a mean over sets of rows. [A] f32.

  Each weighs as many sets as it holds; where it is a part of one set, its share of the set's
  tokens.
  """
  del segments_ABS
  parts = parts_of_set(scope.rows, tokens_ABS1.shape[1])

  def sets(tokens_BS1: Array) -> Array:
    return (row_sums(tokens_BS1, scope.rows) > 0).sum()

  if parts == 1:
    return jax.vmap(sets)(tokens_ABS1).astype(jnp.float32)
  per_set = tokens_ABS1.sum((1, 2, 3)).reshape(-1, parts)  # [sets, micro-batches of a set]
  return (per_set / jnp.maximum(per_set.sum(1, keepdims=True), 1.0)).reshape(-1)


def even_parts(tokens_ABS1: Array, segments_ABS: Array, scope: Scope) -> Array:
  """As `row_parts`, but the micro-batches of one set share it evenly. [A] f32.

  For a loss that is not linear in its tokens; why the shares are even is told by
  `moe.balance.importance.of_sets`.
  """
  parts = parts_of_set(scope.rows, tokens_ABS1.shape[1])
  if parts == 1:
    return row_parts(tokens_ABS1, segments_ABS, scope)
  # A set without any token weighs nothing: it is not in the mean over sets.
  per_set = tokens_ABS1.sum((1, 2, 3)).reshape(-1, parts).sum(1) > 0
  return jnp.repeat(per_set / parts, parts)
