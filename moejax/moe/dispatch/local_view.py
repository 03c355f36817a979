"""What a device is given to dispatch: tokens, where they are routed, and the experts that it holds.

Letters: B batch, S sequence, X devices in an expert-parallel group, E experts of the group,
L = E / X local experts of a device, T tokens of a device, K experts per token, C most tokens of a
row for an expert, D model.
"""

from typing import NamedTuple

from jax import Array

from moejax.moe.experts.weights import Activation, Weights


class RoutedTokens(NamedTuple):
  """Tokens and where they are routed: [T, ...] on a device, [B, S, ...] as global arrays."""

  x: Array  # [T, D]
  # [T, K] i32, outside [0, num_experts) if unassigned; no expert twice for a token
  expert_ids: Array
  scores: Array  # [T, K] f32, which copies stay when a buffer is full: the highest
  weights: Array  # [T, K] f32


class RowQuota(NamedTuple):
  """What each expert takes of each row, where experts choose. Static."""

  length: int  # S, tokens of a row
  most: int  # C


class LocalView(NamedTuple):
  """What a device sees: tokens, and the experts that it holds."""

  tokens: RoutedTokens
  experts: Weights  # [L, ...]
  activation: Activation
  num_experts: int  # that ids count: L, or E where the dispatcher fills buffers for the whole group
  even_share: int  # copies that a device's experts get of an even routing
  quota: RowQuota | None = None  # None: tokens choose, or every row has become a copy
