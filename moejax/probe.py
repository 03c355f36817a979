"""Do routers still change their minds? The experts of one fixed batch of held-out text, and how far two such agree.

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, T tokens of the probe.
"""

from jax import Array
import jax.numpy as jnp
import numpy as np

TOKENS = 4096        # of the batch's first rows, one row at least: of a large run a batch would fill the disk
NOBODY = 2**16 - 1   # in place of an expert


def compact(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """[L, B, S, K] as a model gave them, and [B, S], tokens that count -> the probe [L, T, K] u16."""
  rows = max(1, TOKENS // mask.shape[1])
  ids = expert_ids[:, :rows]
  ids = jnp.where(mask[:rows, :, None] & (ids < num_experts), ids, NOBODY)
  return ids.reshape(len(ids), -1, ids.shape[-1]).astype(jnp.uint16)


def agreement(probe: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Of the probe's copies, the share whose expert is one of the same token's experts in the other. [L, T, K] -> [L]."""
  experts = 1 + int(max(np.max(ids, where=ids != NOBODY, initial=0) for ids in (probe, other)))
  shares = []
  for ids, others in zip(np.minimum(probe, experts), np.minimum(other, experts), strict=True):
    among = np.zeros((len(others), experts + 1), bool)     # NOBODY is now the column after the last expert
    np.put_along_axis(among, others.astype(int), True, axis=1)
    among[:, experts] = False
    copies = (ids < experts).sum()
    shares.append(np.take_along_axis(among, ids.astype(int), axis=1).sum() / copies if copies else 1.0)
  return np.array(shares)
