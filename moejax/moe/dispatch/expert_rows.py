"""The copies of a device's tokens; where experts choose, the C of each row that each of them takes.

There, a token has a place for every expert in its routing, and nearly all are unassigned: as they
are, T * E copies would be sorted, E / K times those that there are.

Letters: D model, E experts, P places of a token, S length of a row, R rows of a device, T = R * S
tokens, C most tokens of a row for an expert, Q = R * C most of a device.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.moe.dispatch.local_view import LocalView, RoutedTokens, RowQuota
from moejax.moe.experts.sorted_copies import Copies, sort_copies


class ExpertRows(NamedTuple):
  """The tokens that each expert takes, in order in each row."""

  tokens: Array  # [E, Q] i32, T for an empty place
  weights: Array  # [E, Q] f32, 0 for an empty place
  dropped: Array  # scalar f32, copies beyond the quota: 0 for a selection that keeps to it


def expert_rows(tokens: RoutedTokens, num_experts: int, quota: RowQuota) -> ExpertRows:
  """Returns what each expert takes of whole rows.

  Args:
    tokens: of a device, whole rows one after the other.
    num_experts: E, those that ids count.
    quota: of a row.
  """
  num_tokens, places = tokens.expert_ids.shape
  length, most = quota
  ids_TP = tokens.expert_ids
  is_assigned_TP = (ids_TP >= 0) & (ids_TP < num_experts)
  # Of each token, which of its places an expert has, or -1: the inverse of ids, by one scatter.
  flat_TP = jnp.arange(num_tokens)[:, None] * num_experts + ids_TP
  flat_TP = jnp.where(is_assigned_TP, flat_TP, num_tokens * num_experts)
  nowhere = jnp.full_like(ids_TP, -1, shape=(num_tokens * num_experts,))
  place_P = jnp.broadcast_to(jnp.arange(places, dtype=ids_TP.dtype), ids_TP.shape)
  place_TE = nowhere.at[flat_TP].set(place_P, mode='drop').reshape(num_tokens, num_experts)
  place_RSE = place_TE.reshape(-1, length, num_experts)
  # Sorted along the row, the tokens that an expert takes come first, and in order.
  column_S1 = jnp.arange(length, dtype=ids_TP.dtype)[:, None]
  taken_RCE = jnp.sort(jnp.where(place_RSE >= 0, column_S1, length), axis=1)[:, :most]
  first_R11 = length * jnp.arange(len(place_RSE), dtype=ids_TP.dtype)[:, None, None]
  token_RCE = jnp.where(taken_RCE < length, first_R11 + taken_RCE, num_tokens)
  token_EQ = token_RCE.reshape(-1, num_experts).T
  expert_E1 = jnp.arange(num_experts)[:, None]
  place_EQ = place_TE.at[token_EQ, expert_E1].get(mode='fill', fill_value=0)
  weight_EQ = tokens.weights.at[token_EQ, place_EQ].get(mode='fill', fill_value=0)
  dropped = is_assigned_TP.sum() - (token_EQ < num_tokens).sum()
  return ExpertRows(token_EQ, weight_EQ, dropped.astype(jnp.float32))


def sort_expert_rows(rows: ExpertRows, num_tokens: int) -> Copies:
  """Returns the E * Q copies sorted by expert, then by token, empty places last and unassigned."""
  num_experts = len(rows.tokens)
  expert_E1 = jnp.arange(num_experts, dtype=rows.tokens.dtype)[:, None]
  ids_EQ = jnp.where(rows.tokens < num_tokens, expert_E1, num_experts)
  copies = sort_copies(ids_EQ.reshape(-1, 1), rows.weights.reshape(-1, 1), num_experts)
  # Unassigned copies are of some token, too.
  token_N = jnp.minimum(rows.tokens.reshape(-1)[copies.tokens], num_tokens - 1)
  return copies._replace(tokens=token_N)


def most_copies(view: LocalView, num_experts: int) -> int:
  """Returns how many copies of a device's tokens so many experts can get at most."""
  num_tokens, top_k = view.tokens.expert_ids.shape
  if view.quota is None:
    # A token has no expert twice.
    return num_tokens * min(top_k, num_experts)
  return num_tokens // view.quota.length * view.quota.most * num_experts


def sort_view(view: LocalView) -> tuple[Copies, Array]:
  """Returns the copies that the view's experts get, and how many are beyond their quota.

  There are `most_copies`, of which the unassigned come last.
  """
  tokens, num_experts = view.tokens, view.num_experts
  if view.quota is not None:
    rows = expert_rows(tokens, num_experts, view.quota)
    return sort_expert_rows(rows, len(tokens.x)), rows.dropped
  tokens_N, weights_N, load_E = sort_copies(tokens.expert_ids, tokens.weights, num_experts)
  most = most_copies(view, num_experts)
  # What is cut off is unassigned.
  copies = Copies(tokens_N[:most], weights_N[:most], load_E)
  return copies, jnp.zeros_like(tokens.weights, shape=())
