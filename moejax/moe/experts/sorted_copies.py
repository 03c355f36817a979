"""The copies of tokens that experts work on, sorted by expert.

A copy is one (token, chosen expert) pair. One that no expert takes is *unassigned*: its id lies
outside [0, E), as those of padding, of dropped copies and of other devices' experts do. Unassigned
copies come last.

Letters: T tokens, E experts, K experts per token, N = T * K copies.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Copies(NamedTuple):
  """The copies of tokens sorted by expert, the unassigned ones last."""

  tokens: Array  # [N] i32  the token that each is a copy of
  weights: Array  # [N] f32  what its output is multiplied by
  load: Array  # [E] i32  copies of each expert; what is past their sum is unassigned


def sort_copies(expert_ids: Array, weights: Array, num_experts: int) -> Copies:
  """Returns the copies sorted by expert, then by token.

  Args:
    expert_ids: [T, K] integers; outside [0, num_experts) for an unassigned copy.
    weights: [T, K] f32.
    num_experts: E, of which some may get no copy.
  """
  top_k = expert_ids.shape[1]
  ids_N = clip_unassigned(expert_ids, num_experts).reshape(-1)
  order_N = order_by_expert(ids_N, num_experts)
  # One bin more than experts counts the unassigned, and is cut off.
  load_E = jnp.bincount(ids_N, length=num_experts + 1)[:num_experts].astype(jnp.int32)
  return Copies(order_N // top_k, weights.reshape(-1)[order_N], load_E)


def order_by_expert(ids_N: Array, num_experts: int) -> Array:
  """Returns the stable order of ids from 0 to E, [N] i32."""
  num_copies = ids_N.size
  if (num_experts + 1) * num_copies > 2**31:
    # The packed keys, (E + 1) N - 1 at most, would overflow an int32.
    return jnp.argsort(ids_N, stable=True).astype(jnp.int32)
  # One sort of `expert * N + index` packed in an integer: several times faster than an argsort.
  keys_N = ids_N * num_copies + jnp.arange(num_copies, dtype=jnp.int32)
  return jnp.sort(keys_N) % num_copies


def clip_unassigned(expert_ids: Array, num_experts: int) -> Array:
  """Returns the ids with every one outside [0, E) set to E, so that unassigned copies sort last."""
  is_assigned = (expert_ids >= 0) & (expert_ids < num_experts)
  return jnp.where(is_assigned, expert_ids, num_experts)


def assigned_mask(copies: Copies) -> Array:
  """[N, 1] bool: which of the sorted copies have an expert."""
  return (jnp.arange(copies.tokens.shape[0]) < copies.load.sum())[:, None]


def expert_of_copies(copies: Copies) -> Array:
  """[N] i32: the expert of each sorted copy; of unassigned ones the last one, to be masked out."""
  ids_E = jnp.arange(copies.load.size)
  return jnp.repeat(ids_E, copies.load, total_repeat_length=copies.tokens.size)
