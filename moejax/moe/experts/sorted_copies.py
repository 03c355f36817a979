"""The copies of tokens that experts work on, sorted by expert.

Letters: T tokens, E experts, K experts per token, N = T * K copies.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Copies(NamedTuple):
  """The copies of tokens sorted by expert; those of nobody (dropped, padding, another shard's) come last."""

  tokens: Array  # [N] i32  the token that each is a copy of
  weights: Array  # [N] f32  what its output is multiplied by
  load: Array  # [E] i32  copies of each expert; what is past their sum belongs to nobody


def sort_copies(expert_ids: Array, weights: Array, num_experts: int) -> Copies:
  """The copies sorted by expert, then by token. [T, K] each -> [N].

  One sort of `expert * N + index` packed in an integer: several times faster than an argsort.
  """
  copies, top_k = expert_ids.size, expert_ids.shape[1]
  ids = clip_unassigned(expert_ids, num_experts).reshape(-1)
  if (num_experts + 1) * copies >= 2**31:
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
  else:
    order = jnp.sort(ids * copies + jnp.arange(copies, dtype=jnp.int32)) % copies
  load = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
  return Copies(order // top_k, weights.reshape(-1)[order], load)


def clip_unassigned(expert_ids: Array, num_experts: int) -> Array:
  """Every id outside [0, E) becomes E."""
  return jnp.where((expert_ids >= 0) & (expert_ids < num_experts), expert_ids, num_experts)


def owned(copies: Copies) -> Array:
  """[N, 1] bool: copies that belong to some expert."""
  return (jnp.arange(copies.tokens.shape[0]) < copies.load.sum())[:, None]


def expert_of(copies: Copies) -> Array:
  """[N] i32: whose each copy is; of nobody's, the last expert's."""
  return jnp.repeat(
    jnp.arange(copies.load.size), copies.load, total_repeat_length=copies.tokens.size
  )
