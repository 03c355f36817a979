"""Buffers of a fixed capacity: how large they are, and in which order copies take their places."""

import math

import jax.numpy as jnp
import numpy as np

from moejax.moe.dispatch.buffers import capacity, capacity_matmul, queue_copies
from moejax.moe.dispatch.dispatchers import DROP_BY
from moejax.moe.dispatch.local_view import LocalView, RoutedTokens
from moejax.moe.experts.weights import Weights

IDS = jnp.array([[0, 1], [1, 2], [1, 0]], jnp.int32)  # of two experts: 2 is unassigned
SCORES = jnp.array([[0.1, 0.2], [0.2, 0.9], [0.8, 0.7]])
TOKENS = RoutedTokens(jnp.zeros((3, 4)), IDS, SCORES, jnp.ones((3, 2)))


def test_capacity_is_rounded_up_and_never_more_than_all_copies() -> None:
  assert capacity(num_copies=12, num_experts=8, capacity_factor=1.0) == 2
  assert capacity(num_copies=12, num_experts=8, capacity_factor=0.1) == 1
  assert capacity(num_copies=12, num_experts=8, capacity_factor=100.0) == 12


def test_capacity_is_exact_for_the_factor_as_it_is_written() -> None:
  """Of every count: a product of floats is above what it should be in one of twenty."""
  assert capacity(1000, 10, 1.1) == 110
  rng, off = np.random.default_rng(0), 0
  for percent in (1, 7, 55, 100, 105, 110, 115, 125, 140, 190, 235, 1000):
    for experts in (1, 2, 7, 10, 60, 64, 256):
      for copies in (experts * 100, experts * 700, *rng.integers(1, 2**31, 4).tolist()):
        want = min(copies, max(1, -(-copies * percent // (experts * 100))))
        assert capacity(copies, experts, percent / 100) == want, (copies, experts, percent)
        off += math.ceil(copies / experts * (percent / 100)) > want
  assert off > 10


def test_copies_queue_by_score_and_by_position() -> None:
  by_score = queue_copies(TOKENS, 2, 'probs')
  assert by_score.expert_ids.tolist() == [0, 0, 1, 1, 1, 2]
  # Of expert 1, the best first, then the first of two equal ones.
  assert by_score.copies.tolist() == [5, 0, 4, 1, 2, 3]
  assert by_score.rank.tolist() == [0, 1, 0, 1, 2, 0]
  by_position = queue_copies(TOKENS, 2, 'position')
  assert by_position.copies.tolist() == [0, 5, 1, 2, 4, 3]


def test_padding_takes_no_room() -> None:
  """Unassigned copies, however keen, queue behind all experts, and fill no buffer."""
  ids = jnp.array([[2, 2], [0, 1], [-1, 2], [0, 1], [1, 0]], jnp.int32)  # of two experts
  scores = jnp.where((ids >= 0) & (ids < 2), 0.1, 9.0)
  weights = Weights(*(jnp.ones((2, *shape)) for shape in ((4, 3), (4, 3), (3, 4))))
  for drop_by in DROP_BY:
    tokens = RoutedTokens(jnp.ones((5, 4)), ids, scores, jnp.ones((5, 2)))
    view = LocalView(tokens, weights, lambda gate, up: gate * up, num_experts=2, even_share=10)
    # 10 copies, 2 experts: C is 3, as many as each has of the three tokens that count.
    y, dropped = capacity_matmul(view, 0.6, drop_by)
    assert dropped == 0 and y.any(-1).tolist() == [False, True, False, True, True]
