"""Buffers of a fixed capacity: how large they are, and in which order copies take their places."""

import jax.numpy as jnp

from moejax.moe.dispatch.buffers import capacity, queue_copies
from moejax.moe.dispatch.local_view import RoutedTokens

IDS = jnp.array([[0, 1], [1, 2], [1, 0]], jnp.int32)  # of two experts: 2 is unassigned
SCORES = jnp.array([[0.1, 0.2], [0.2, 0.9], [0.8, 0.7]])
TOKENS = RoutedTokens(jnp.zeros((3, 4)), IDS, SCORES, jnp.ones((3, 2)))


def test_capacity_is_rounded_up_and_never_more_than_all_copies() -> None:
  assert capacity(num_copies=12, num_experts=8, capacity_factor=1.0) == 2
  assert capacity(num_copies=12, num_experts=8, capacity_factor=0.1) == 1
  assert capacity(num_copies=12, num_experts=8, capacity_factor=100.0) == 12


def test_copies_queue_by_score_and_by_position() -> None:
  by_score = queue_copies(TOKENS, 2, 'probs')
  assert by_score.expert_ids.tolist() == [0, 0, 1, 1, 1, 2]
  # Of expert 1, the best first, then the first of two equal ones.
  assert by_score.copies.tolist() == [5, 0, 4, 1, 2, 3]
  assert by_score.rank.tolist() == [0, 1, 0, 1, 2, 0]
  by_position = queue_copies(TOKENS, 2, 'position')
  assert by_position.copies.tolist() == [0, 5, 1, 2, 4, 3]
