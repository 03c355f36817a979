"""How unevenly experts are used: the losses that push against it, and the config that switches them on.

  routing, mask, segments -> sums over each set of tokens -> L_g = sum_e f_ge P_ge -> mean over sets

One loss with four switches: the *set* of tokens that f and P are taken over, the *partition* that is balanced, the
*assignment* that f counts, the *probability* that P is. It is 1 at perfect balance whatever E, K and the score are.
Values are without coefficient; layers are averaged.

The same coefficient alpha elsewhere, and what `convert_coefficient` makes of it for K experts per token, L MoE layers:

  codebase       its loss at perfect balance                                        ours
  megatron       1, summed over layers                                              alpha L
  olmo_core      1, each layer adds its own                                         alpha L
  maxtext        K, mean over layers                                                alpha K
  huggingface    K, f and P each averaged over all layers before the product        alpha K, another function of layers
  levanter       1/K, summed over layers (its Mixtral)                              alpha L / K

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts, G sets of tokens, A micro-batches.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.config import check, frozendict
from moejax.moe.balance.aux_loss import assignment_counts, gshard_loss, row_sets_loss, sequence_loss
from moejax.moe.balance.importance import importance, importance_seen, load_seen, smooth_load
from moejax.moe.balance.regularisers import router_z, simbal
from moejax.moe.routing import Routing
from moejax.moe.token_sets import Scope, document_parts, even_parts, row_parts, token_parts


def convert_coefficient(codebase: str, alpha: float, *, top_k: int, num_moe_layers: int) -> float:
  """Our coefficient for another codebase's, by the table above.

  Raises:
    ConfigError: the codebase is not in the table.
  """
  check('' if codebase in CODEBASES else f'codebase={codebase!r} is not one of {sorted(CODEBASES)}')
  return alpha * CODEBASES[codebase](top_k, num_moe_layers)


def micro_batch_shares(loss: str, mask: Array, segments: Array, scope: Scope) -> Array:
  """What part of the batch's loss each micro-batch's is: weights that sum to 1. [A, b, S] each -> [A] f32.

  A mean over sets is the micro-batches' means weighed by how many sets each holds; where a set spans micro-batches,
  by its tokens. It depends on masks alone, so it is known before the first micro-batch is differentiated.
  """
  parts = BALANCE_LOSSES[loss].parts(mask.astype(jnp.float32)[..., None], segments, scope)
  total = parts.sum()
  return parts / jnp.where(total > 0, total, 1.0)


def spans_micro_batches(scopes: frozendict, micro_rows: int) -> tuple[str, ...]:
  """The losses with sets larger than a micro-batch: they must know of the whole set before any gradient."""
  return tuple(name for name, scope in scopes.items() if scope.rows > micro_rows)


class BalanceLoss(NamedTuple):
  """`value(routing, mask, segments[, scope]) -> scalar`, and how it is put together from micro-batches.

  parts: see `shares`.  rows: of one set, 0 if its sets are not rows.  seen(routing, mask, scope) -> [E]: what must be
  known of the whole set.  linear: in P, f being given.
  """

  value: Callable[..., Array]
  parts: Callable[[Array, Array, Scope], Array]
  rows: Callable[[int, int, int], int]  # of (batch_size, micro_batches, ep_groups)
  seen: Callable[[Routing, Array, Scope], Array] = assignment_counts
  linear: bool = True


BALANCE_LOSSES: dict[str, BalanceLoss] = {
  'ep_group': BalanceLoss(
    row_sets_loss, row_parts, lambda batch, micro_batches, groups: batch // groups
  ),
  'global_batch': BalanceLoss(row_sets_loss, row_parts, lambda batch, micro_batches, groups: batch),
  'gshard': BalanceLoss(
    gshard_loss, row_parts, lambda batch, micro_batches, groups: batch // micro_batches
  ),
  'importance': BalanceLoss(
    importance, even_parts, lambda batch, micro_batches, groups: batch, importance_seen, False
  ),
  'load': BalanceLoss(
    smooth_load, even_parts, lambda batch, micro_batches, groups: batch, load_seen, False
  ),
  'micro_batch': BalanceLoss(
    row_sets_loss, row_parts, lambda batch, micro_batches, groups: batch // micro_batches
  ),
  'router_z': BalanceLoss(router_z, token_parts, lambda batch, micro_batches, groups: 0),
  'sequence': BalanceLoss(sequence_loss, document_parts, lambda batch, micro_batches, groups: 0),
  'simbal': BalanceLoss(simbal, token_parts, lambda batch, micro_batches, groups: 0),
}

# codebase -> (K, L) to what its coefficient is multiplied by.
CODEBASES: dict[str, Callable[[int, int], float]] = {
  'huggingface': lambda top_k, layers: top_k,
  'levanter': lambda top_k, layers: layers / top_k,
  'maxtext': lambda top_k, layers: top_k,
  'megatron': lambda top_k, layers: layers,
  'olmo_core': lambda top_k, layers: layers,
}
