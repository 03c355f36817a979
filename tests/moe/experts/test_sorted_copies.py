"""Sorting copies by expert: order, weights, load, and where the unassigned ones go."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.experts.sorted_copies import (
  assigned_mask,
  clip_unassigned,
  expert_of_copies,
  order_by_expert,
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


@pytest.mark.parametrize('over', [0, 1])
def test_keys_are_packed_up_to_the_last_that_an_int32_holds(over: int) -> None:
  """The largest key, of the last copy unassigned, is (E + 1) N - 1."""
  num_copies = 2**10
  num_experts = 2**31 // num_copies - 1 + over
  ids = np.array([num_experts, 0, num_experts - 1, num_experts, *[7] * (num_copies - 4)], np.int32)
  order = np.asarray(order_by_expert(jnp.asarray(ids), num_experts))
  np.testing.assert_array_equal(order, np.argsort(ids, kind='stable'))
