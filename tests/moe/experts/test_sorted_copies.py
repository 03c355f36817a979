"""Sorting copies by expert: order, weights, load, and where the unassigned ones go."""

import jax.numpy as jnp
import numpy as np

from moejax.moe.experts.sorted_copies import (
  assigned_mask,
  clip_unassigned,
  expert_of_copies,
  sort_copies,
)

IDS = np.array([[2, 0], [-1, 2], [0, 3], [7, 0]], np.int32)  # of three experts, 0 to 2
WEIGHTS = np.arange(8, dtype=np.float32).reshape(4, 2)


def test_copies_are_sorted_by_expert_then_by_token() -> None:
  copies = sort_copies(jnp.asarray(IDS), jnp.asarray(WEIGHTS), 3)
  assert copies.tokens.tolist() == [0, 2, 3, 0, 1, 1, 2, 3]
  assert copies.weights.tolist() == [1, 4, 7, 0, 3, 2, 5, 6]
  assert copies.load.tolist() == [3, 0, 2]


def test_copies_too_many_to_pack_are_sorted_alike() -> None:
  """From (E + 1) N = 2^31 on, keys of expert and index overflow."""
  num_experts, tokens = 2**11, 2**19
  ids = np.random.default_rng(0).integers(0, num_experts + 1, (tokens, 2)).astype(np.int32)
  copies = sort_copies(jnp.asarray(ids), jnp.asarray(ids, jnp.float32), num_experts)
  order = np.argsort(ids.reshape(-1), kind='stable')
  np.testing.assert_array_equal(copies.tokens, order // 2)
  np.testing.assert_array_equal(copies.weights, ids.reshape(-1)[order])


def test_unassigned_copies_have_no_expert_and_come_last() -> None:
  assert clip_unassigned(jnp.asarray(IDS), 3).tolist() == [[2, 0], [3, 2], [0, 3], [3, 0]]
  copies = sort_copies(jnp.asarray(IDS), jnp.asarray(WEIGHTS), 3)
  assert assigned_mask(copies)[:, 0].tolist() == [True] * 5 + [False] * 3
  assert expert_of_copies(copies)[:5].tolist() == [0, 0, 0, 2, 2]
