"""How five codebases compute their balance loss, with coefficient 1, as one float64 number for the whole model.

Their formulas as their public source has them, written anew; which layers they add up and which they average is what
`balance.convert_coefficient` has to know. No padding, one micro-batch: how they go wrong beyond that is not the matter.
Letters: L MoE layers B batch S sequence E experts K experts per token T = B*S.
"""

from collections.abc import Callable

import numpy as np

from moejax.certify.oracle.routing import F64, I64


def one_hot(ids: I64, num_experts: int) -> F64:
  """How often each expert is among a token's K. [..., K] -> [..., E]."""
  return (ids[..., None] == np.arange(num_experts)).sum(-2).astype(np.float64)


def megatron(probs: F64, ids: I64) -> float:
  """Σ_e (Σ_t p)(tokens of e) · E/(K T²) of a layer (`switch_load_balancing_loss_func`), summed over layers."""
  num_experts, top_k, tokens = probs.shape[-1], ids.shape[-1], probs.shape[1] * probs.shape[2]
  return sum(
    float(
      (p.sum((0, 1)) * one_hot(i, num_experts).sum((0, 1))).sum()
      * num_experts
      / (top_k * tokens**2)
    )
    for p, i in zip(probs, ids, strict=True)
  )


def olmo_core(probs: F64, ids: I64) -> float:
  """E/K · tokens of e · Σ_t p, over T² as labels and as mean score; every layer has a loss of its own, all added."""
  num_experts, top_k, tokens = probs.shape[-1], ids.shape[-1], probs.shape[1] * probs.shape[2]
  total = 0.0
  for p, i in zip(probs, ids, strict=True):
    total += (
      num_experts
      / top_k
      * float(one_hot(i, num_experts).sum((0, 1)) @ p.sum((0, 1)))
      / tokens
      / tokens
    )
  return total


def maxtext(probs: F64, ids: I64) -> float:
  """Mean over rows and experts of (mean over S of the mask)(mean over S of p) · E², mean over layers."""
  num_experts = probs.shape[-1]
  return float(
    np.mean(
      [
        (one_hot(i, num_experts).mean(1) * p.mean(1)).mean() * num_experts**2
        for p, i in zip(probs, ids, strict=True)
      ]
    )
  )


def huggingface(probs: F64, ids: I64) -> float:
  """E Σ (mean over the tokens of all layers of the mask of each of K places)(mean over them of p)."""
  num_experts = probs.shape[-1]
  places = (
    (ids[..., None] == np.arange(num_experts)).reshape(-1, ids.shape[-1], num_experts).mean(0)
  )  # [K, E]
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
