"""Balance losses and routers as another codebase may have them: float NumPy, right and wrong."""

import numpy as np

from moejax.certify.oracle import balance as oracle
from moejax.certify.oracle import selection
from moejax.certify.oracle.routing import probabilities

Array = np.ndarray


def softmax(z: Array) -> Array:
  """exp z / Σ exp z, in the dtype of z."""
  powers = np.exp(z - z.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def sigmoid(z: Array) -> Array:
  """1 / (1 + exp -z), in the dtype of z."""
  with np.errstate(over='ignore'):
    return 1 / (1 + np.exp(-z))


def normalised_sigmoid(z: Array) -> Array:
  """Sigmoid over its sum, by logarithms: rows sum to 1 however small the scores are."""
  logs = np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))
  return softmax(logs)


def rows_loss(p: Array, ids: Array, mask: Array) -> Array:
  """f times P of each row, in the dtype of p; rows without a token give 0. [B]."""
  experts, keep = p.shape[-1], mask[..., None].astype(p.dtype)
  chosen = (ids[..., None] == np.arange(experts)).sum(-2).astype(p.dtype) * keep
  f = experts * chosen.sum(1) / np.maximum(chosen.sum((1, 2)), 1)[:, None]
  mean = (p * keep).sum(1) / np.maximum(keep.sum(1), 1)
  return (f * mean).sum(-1)


def mean_of_rows(p: Array, ids: Array, mask: Array) -> np.floating:
  """The sequence loss of rows that are one document each."""
  return rows_loss(p, ids, mask).sum() / p.dtype.type(max(mask.any(1).sum(), 1))


def top(scores: Array, k: int) -> Array:
  """The k largest entries, best first."""
  return np.argsort(-scores, axis=-1, kind='stable')[..., :k]


def sequence(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  """The sequence loss of softmax scores."""
  return mean_of_rows(softmax(logits), expert_ids, mask)


def own_choice(logits: Array, mask: Array) -> np.floating:
  """The same, of the two best experts."""
  return sequence(logits, top(logits, 2), mask)


def with_gradient(logits: Array, expert_ids: Array, mask: Array) -> tuple[np.floating, Array]:
  """The sequence loss of softmax scores, and its gradient to the logits."""
  p, experts, keep = softmax(logits), logits.shape[-1], mask[..., None].astype(logits.dtype)
  chosen = (expert_ids[..., None] == np.arange(experts)).sum(-2) * keep
  f = experts * chosen.sum(1, keepdims=True) / np.maximum(chosen.sum((1, 2)), 1)[:, None, None]
  rows = max(mask.any(1).sum(), 1)
  to_p = (f * keep / np.maximum(keep.sum(1, keepdims=True), 1) / rows).astype(logits.dtype)
  gradient = p * (to_p - (to_p * p).sum(-1, keepdims=True))
  return mean_of_rows(p, expert_ids, mask), gradient


def of_oracle(like: str, top_k: int, score_fn: str = 'softmax') -> object:
  """The oracle itself, wrapped as a function of what a loss of this name looks at."""

  def product(logits: Array, expert_ids: Array, mask: Array, segment_ids: Array) -> float:
    ids = expert_ids[..., :1] if like == 'gshard' else expert_ids
    sets = oracle.sets_of(like, segment_ids)
    return oracle.mean_over_sets(
      oracle.probability_losses(probabilities(logits, score_fn), ids, mask, sets)
    )

  def importance(logits: Array, expert_ids: Array, mask: Array) -> float:
    logs = selection.log_scores(logits, score_fn)
    weights = selection.weigh_chosen(logs, expert_ids)
    return oracle.importance(weights, expert_ids, mask, logits.shape[-1])

  def load(logits: Array, noise: Array, std: Array, mask: Array) -> float:
    noisy = logits.astype(np.float64) + noise
    return oracle.smooth_load(selection.likely(logits, noisy, std, top_k), mask)

  def simbal(router: Array) -> float:
    return oracle.simbal(router)

  others = {'importance': importance, 'load': load, 'simbal': simbal, 'router_z': oracle.router_z}
  return others[like] if like in others else product


def sigmoid_router(logits: Array, bias: Array, epsilon: float = 0.0) -> tuple[Array, Array]:
  """Two experts by sigmoid plus bias, weighed by the sigmoid, renormalised."""
  scores = sigmoid(logits)
  ids = top(scores + bias, 2)
  weights = np.take_along_axis(scores, ids, -1)
  total = weights.sum(-1, keepdims=True) + scores.dtype.type(epsilon)
  return ids, np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
