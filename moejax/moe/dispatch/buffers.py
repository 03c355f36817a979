"""Expert buffers of a fixed capacity: who gets a place in them, and the experts' outputs for those.

Letters: D model, E experts, K experts per token, C capacity, T tokens of a device, N = T * K
copies, Q = E * C slots of all buffers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.config.decimals import decimal_of
from moejax.moe.dispatch.exchange import ffn_at_experts
from moejax.moe.dispatch.expert_rows import expert_rows
from moejax.moe.dispatch.local_view import LocalView, RoutedTokens, RowQuota
from moejax.moe.experts.sorted_copies import clip_unassigned
from moejax.moe.experts.weights import batched_ffn
from moejax.moe.saved_names import EXPERTS


def capacity(num_copies: int, num_experts: int, capacity_factor: float) -> int:
  """Returns C = ceil(N / E * capacity_factor), at most all copies: rows in an expert's buffer.

  Exactly, by the factor as it is written: 1000 copies, 10 experts and 1.1 give 110.
  """
  rows = math.ceil(num_copies * decimal_of(capacity_factor) / num_experts)
  return min(num_copies, max(1, rows))


class Queue(NamedTuple):
  """The copies sorted by expert, then by who comes first."""

  expert_ids: Array  # [N] i32, E for the unassigned, which come last
  copies: Array  # [N] i32, which of the unsorted copies it is: t * K + k
  rank: Array  # [N] i32, place in the expert's queue


def queue_copies(tokens: RoutedTokens, num_experts: int, drop_by: str) -> Queue:
  """Returns the order in which copies take room in their experts' buffers.

  Args:
    tokens: of one device.
    num_experts: that ids count; unassigned copies queue behind all experts.
    drop_by: 'probs' for the highest score first, and of equal ones the first token; 'position' for
      the first token first.
  """
  ids_N = clip_unassigned(tokens.expert_ids, num_experts).reshape(-1)
  index_N = jnp.arange(ids_N.size, dtype=jnp.int32)
  scores_N = tokens.scores.reshape(-1)
  priority_N = -scores_N if drop_by == 'probs' else jnp.zeros_like(scores_N)
  # Two keys; a stable sort leaves ties in the order of tokens.
  sorted_ids_N, _, order_N = jax.lax.sort((ids_N, priority_N, index_N), num_keys=2, is_stable=True)
  load = jnp.bincount(ids_N, length=num_experts + 1)  # [E + 1], the last one of the unassigned
  rank_N = index_N - (jnp.cumsum(load) - load)[sorted_ids_N]
  return Queue(sorted_ids_N, order_N, rank_N)


def capacity_matmul(view: LocalView, capacity_factor: float, drop_by: str) -> tuple[Array, Array]:
  """A batched product on buffers of C rows for each expert; what has no room is dropped.

  A full expert drops the lowest scores ('probs') or the last tokens ('position'). Weights are not
  renormalised after a drop. Dropping by score is not causal: a later token can take an earlier
  one's place. On a mesh, C is that of each device's own tokens, which fill buffers for all experts.

  Args:
    view: of one device, with ids that count all experts of the group.
    capacity_factor: above 0, see `capacity`.
    drop_by: see `queue_copies`.

  Returns:
    y [T, D], and how many copies were dropped, a scalar f32.
  """
  tokens, num_experts = view.tokens, view.num_experts
  num_tokens, top_k = tokens.expert_ids.shape
  rows = capacity(num_tokens * top_k, num_experts, capacity_factor)
  num_slots = num_experts * rows
  queue = queue_copies(tokens, num_experts, drop_by)
  fits_N = (queue.rank < rows) & (queue.expert_ids < num_experts)
  # Copies without room get a slot past the end, and indexing below drops what is written there.
  slot_N = jnp.where(fits_N, queue.expert_ids * rows + queue.rank, num_slots)
  # By index: products with one-hot matrices would need [T, E, C] masks.
  no_token_Q = jnp.full_like(slot_N, num_tokens, shape=(num_slots,))
  token_Q = no_token_Q.at[slot_N].set(queue.copies // top_k, mode='drop')
  no_weight_Q = jnp.zeros_like(tokens.weights, shape=(num_slots,))
  weight_Q = no_weight_Q.at[slot_N].set(tokens.weights.reshape(-1)[queue.copies], mode='drop')
  y_TD = buffers_matmul(view, token_Q.reshape(num_experts, rows), weight_Q)
  is_dropped_N = (queue.expert_ids < num_experts) & ~fits_N
  return y_TD, is_dropped_N.sum().astype(jnp.float32)


def quota_matmul(view: LocalView, quota: RowQuota) -> tuple[Array, Array]:
  """A batched product on the rows that each expert has taken, where experts choose.

  Args:
    view: of one device, with ids that count its own experts.
    quota: of a row.

  Returns:
    y [T, D], and how many copies were beyond the quota, a scalar f32.
  """
  rows = expert_rows(view.tokens, view.num_experts, quota)
  return buffers_matmul(view, rows.tokens, rows.weights), rows.dropped


def buffers_matmul(view: LocalView, token_EC: Array, weight_EC: Array) -> Array:
  """Returns y [T, D]: what experts give for the tokens in their buffers, by a batched product.

  Args:
    view: of one device.
    token_EC: integers, the token in each slot; T for an empty slot.
    weight_EC: f32, in the same order, of any shape: what a slot's output is multiplied by.
  """
  tokens = view.tokens
  # An empty slot has a token past the end: its row is zeros, and its output is added to no token.
  buffers_ECD = tokens.x.at[token_EC].get(mode='fill', fill_value=0)
  ffn = functools.partial(batched_ffn, weights=view.experts, activation=view.activation)
  out_ECD = ffn_at_experts(ffn, buffers_ECD, view.experts.gate.shape[0])
  # Read backwards, too: for the gradient of the weights.
  out_ECD = checkpoint_name(out_ECD, EXPERTS)
  scaled_ECD = out_ECD * weight_EC.reshape(*token_EC.shape, 1).astype(out_ECD.dtype)
  return jnp.zeros_like(tokens.x).at[token_EC].add(scaled_ECD, mode='drop')
