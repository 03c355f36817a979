"""How five codebases compute their balance loss, as one float64 number for the whole model.

Each has coefficient 1. The formulas are as their public source has them, written anew; which layers
they add up and which they average is what `balance.convert_coefficient` has to know. No padding,
one micro-batch: how they go wrong beyond that is not the matter. All take probs [L, B, S, E] and
expert ids [L, B, S, K].

Letters: L MoE layers, B batch, S sequence, E experts, K experts per token, T = B*S.
"""

from collections.abc import Callable

import numpy as np

from moejax.certify.oracle.routing import F64, I64


def one_hot(ids: I64, num_experts: int) -> F64:
  """How often each expert is among a token's K. [..., K] -> [..., E]."""
  return (ids[..., None] == np.arange(num_experts)).sum(-2).astype(np.float64)


def megatron(probs: F64, ids: I64) -> float:
  """Σ_e (Σ_t p)(tokens of e) · E/(K T²) of a layer, summed over layers.

  Its `switch_load_balancing_loss_func`.
  """
  num_experts, top_k, tokens = probs.shape[-1], ids.shape[-1], probs.shape[1] * probs.shape[2]
  total = 0.0
  for p, i in zip(probs, ids, strict=True):
    counts = one_hot(i, num_experts).sum((0, 1))
    total += float((p.sum((0, 1)) * counts).sum() * num_experts / (top_k * tokens**2))
  return total


def olmo_core(probs: F64, ids: I64) -> float:
  """E/K · tokens of e · Σ_t p, over T² as labels and as mean score.

  Every layer has a loss of its own, all added.
  """
  num_experts, top_k, tokens = probs.shape[-1], ids.shape[-1], probs.shape[1] * probs.shape[2]
  total = 0.0
  for p, i in zip(probs, ids, strict=True):
    counts = one_hot(i, num_experts).sum((0, 1))
    total += num_experts / top_k * float(counts @ p.sum((0, 1))) / tokens / tokens
  return total


def maxtext(probs: F64, ids: I64) -> float:
  """(mean over S of the mask)(mean over S of p) · E², mean over rows, experts and layers."""
  num_experts, of_layers = probs.shape[-1], []
  for p, i in zip(probs, ids, strict=True):
    density = one_hot(i, num_experts).mean(1)
    of_layers.append((density * p.mean(1)).mean() * num_experts**2)
  return float(np.mean(of_layers))


def huggingface(probs: F64, ids: I64) -> float:
  """E Σ (mean over tokens of the mask of each of K places)(mean over tokens of p).

  Both are means over the tokens of all layers.
  """
  num_experts, top_k = probs.shape[-1], ids.shape[-1]
  chosen = ids[..., None] == np.arange(num_experts)
  places = chosen.reshape(-1, top_k, num_experts).mean(0)  # [K, E]
  return float((places * probs.reshape(-1, num_experts).mean(0)).sum() * num_experts)


def levanter(probs: F64, ids: I64) -> float:
  """Σ_e (E/K · share of the copies)(mean p) of a layer, summed over layers (its Mixtral)."""
  num_experts, top_k = probs.shape[-1], ids.shape[-1]
  total = 0.0
  for p, i in zip(probs, ids, strict=True):
    counts = one_hot(i, num_experts).sum((0, 1))
    total += float((counts / counts.sum() * num_experts / top_k * p.mean((0, 1))).sum())
  return total


# codebase -> its loss, and ours whose sets are the same, where layers are not pooled.
CODEBASES: dict[str, tuple[Callable[[F64, I64], float], str]] = {
  'megatron': (megatron, 'global_batch'),
  'olmo_core': (olmo_core, 'global_batch'),
  'maxtext': (maxtext, 'sequence'),
  'huggingface': (huggingface, ''),
  'levanter': (levanter, 'global_batch'),
}
