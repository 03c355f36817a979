"""Batches of logits that are odd in every way that routing and balance must bear.

NumPy alone: a certificate of a foreign function, which may hold a device of its own, starts no jax.

Letters: B batch, S sequence, E experts.
"""

from typing import NamedTuple

import numpy as np

B, S = 4, 8  # of the batches of logits


class Case(NamedTuple):
  """A batch of logits, and which of its tokens count."""

  logits: np.ndarray  # [B, S, E] f32
  bias: np.ndarray  # [E] f32
  mask: np.ndarray  # [B, S] bool
  segments: np.ndarray  # [B, S] i32


# Segment ids [B, S]: one document a row, padded rows, several documents a row, and both of these
# with a row that is all padding.
WHOLE = np.ones((B, S), np.int32)
PADDED = (np.arange(S) < np.array([[8], [5], [1], [3]])).astype(np.int32)
PACKED = np.array(
  [[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 3, 3, 3, 4, 4], [1] * 8, [1] * 4 + [2] * 4], np.int32
)
MIXED = np.where(np.arange(S) < np.array([[8], [6], [0], [7]]), PACKED, 0).astype(np.int32)


def draw_cases(rng: np.random.Generator, num_experts: int) -> dict[str, Case]:
  """Batches of logits drawn from a generator, by what is unusual about them."""
  shape = (B, S, num_experts)
  # The order of the draws is part of the cases: another order gives another certificate.
  bias = rng.normal(scale=0.3, size=num_experts).astype(np.float32)
  no_bias = np.zeros(num_experts, np.float32)
  plain = rng.normal(size=shape).astype(np.float32)
  ahead, avoided = plain.copy(), plain.copy()
  ahead[..., 1], avoided[..., 0] = 50, -20
  # Tokens inside a document that do not count, and a document of which no token does.
  holes = (MIXED > 0) & (rng.random((B, S)) < 0.8)
  holes[0, 3:7] = False
  single = np.zeros((B, S), bool)
  single[1, 2] = True
  return {
    'plain': Case(plain, no_bias, WHOLE > 0, WHOLE),
    'padded': Case(2 * plain, bias, PADDED > 0, PADDED),
    'packed': Case(plain, bias, PACKED > 0, PACKED),
    'holes': Case(plain, bias, holes, MIXED),
    'ties': Case(rng.integers(0, 2, shape).astype(np.float32), no_bias, MIXED > 0, MIXED),
    'equal': Case(np.zeros(shape, np.float32), bias, MIXED > 0, MIXED),
    # Softmax of what is 1e4 below the largest logit underflows to 0.
    'extreme': Case(rng.choice([-1e4, 0, 1e4], shape).astype(np.float32), bias, MIXED > 0, MIXED),
    'all to one': Case(ahead, bias, MIXED > 0, MIXED),
    'one unchosen': Case(avoided, no_bias, MIXED > 0, MIXED),
    # Scores of sigmoid are near exp(-50): an epsilon in a sum of them would show.
    'low': Case(plain - 50, no_bias, MIXED > 0, MIXED),
    'single': Case(plain, bias, single, PACKED),
    'nothing': Case(plain, bias, np.zeros((B, S), bool), PADDED),
  }
