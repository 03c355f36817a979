"""How unevenly experts are used: the table of losses that push against it.

  routing, mask, segments -> sums over each set of tokens -> L_g = sum_e f_ge P_ge -> mean over sets

One loss with four switches: the *set* of tokens that f and P are taken over, the *partition* that
is balanced, the *assignment* that f counts, the *probability* that P is. It is 1 at perfect balance
whatever E, K and the score are. Values are without coefficient; layers are averaged.

The same coefficient alpha elsewhere, and what `convert_coefficient` makes of it for K experts per
token, L MoE layers:

  codebase     its loss at perfect balance                       ours
  megatron     1, summed over layers                             alpha L
  olmo_core    1, each layer adds its own                        alpha L
  maxtext      K, mean over layers                               alpha K
  huggingface  K, f and P averaged over layers, then multiplied  alpha K, another function of layers
  levanter     1/K, summed over layers (its Mixtral)             alpha L / K

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts, G sets of tokens,
A micro-batches.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.config import check, frozendict, not_one_of
from moejax.moe.balance.aux_loss import assignment_counts, gshard_loss, row_sets_loss, sequence_loss
from moejax.moe.balance.importance import importance, importance_seen, load_seen, smooth_load
from moejax.moe.balance.misfits import even_counts, even_first_choices, no_misfit, no_noise
from moejax.moe.balance.regularisers import router_z, simbal
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.token_sets import Scope, document_parts, even_parts, row_parts, token_parts


def convert_coefficient(codebase: str, alpha: float, *, top_k: int, num_moe_layers: int) -> float:
  """Our coefficient for another codebase's, by the table above.

  Raises:
    ConfigError: the codebase is not in the table.
  """
  check(not_one_of('codebase', codebase, CODEBASES))
  return alpha * CODEBASES[codebase](top_k, num_moe_layers)


def micro_batch_shares(loss: str, mask_ABS: Array, segments_ABS: Array, scope: Scope) -> Array:
  """What part of the batch's loss each micro-batch's is: weights [A] f32 that sum to 1.

  A mean over sets is the micro-batches' means weighed by how many sets each holds; where a set
  spans micro-batches, by its tokens. It depends on masks alone, so it is known before the first
  micro-batch is differentiated.
  """
  tokens_ABS1 = mask_ABS.astype(jnp.int32)[..., None]
  parts_A = BALANCE_LOSSES[loss].parts(tokens_ABS1, segments_ABS, scope)
  total = parts_A.sum()
  return parts_A / jnp.where(total > 0, total, 1.0)  # a batch without a token: all 0


def spans_micro_batches(scopes: frozendict, micro_rows: int) -> tuple[str, ...]:
  """Returns the losses with sets larger than a micro-batch.

  They must know of the whole set before any gradient.
  """
  return tuple(name for name, scope in scopes.items() if scope.rows > micro_rows)


class BalanceLoss(NamedTuple):
  """A loss, and how the micro-batches of a step add up to it."""

  # (routing, mask [B, S], segments [B, S][, scope]) -> scalar, without coefficient.
  value: Callable[..., Array]
  # (tokens [A, B, S, 1], segments [A, B, S], scope) -> the weight of each micro-batch [A], before
  # `micro_batch_shares` makes them sum to 1.
  parts: Callable[[Array, Array, Scope], Array]
  # (batch_size, micro_batches, ep_groups) -> rows of one set; 0 if its sets are not rows.
  rows: Callable[[int, int, int], int]
  # (router, scope) -> why its gradient would be 0 whatever that router says, '' where it is not.
  misfit: Callable[[RouterConfig, Scope], str]
  # (routing, mask [B, S], scope) -> [E], what must be known of the whole set; it adds up. Counts
  # are i32, other sums f32.
  seen: Callable[[Routing, Array, Scope], Array] = assignment_counts
  # In P, f being given: then f may also come from another step, or from a part of the set.
  linear: bool = True


# Rows of one set, by (batch_size, micro_batches, ep_groups).


def all_rows(batch_size: int, micro_batches: int, ep_groups: int) -> int:
  """The whole batch is one set."""
  return batch_size


def rows_of_micro_batch(batch_size: int, micro_batches: int, ep_groups: int) -> int:
  """Every micro-batch is a set."""
  return batch_size // micro_batches


def rows_of_ep_group(batch_size: int, micro_batches: int, ep_groups: int) -> int:
  """The rows of every expert-parallel group are a set."""
  return batch_size // ep_groups


def no_rows(batch_size: int, micro_batches: int, ep_groups: int) -> int:
  """Sets are not made of rows: documents, or single tokens."""
  return 0


BALANCE_LOSSES: dict[str, BalanceLoss] = {
  'ep_group': BalanceLoss(row_sets_loss, row_parts, rows_of_ep_group, even_counts),
  'global_batch': BalanceLoss(row_sets_loss, row_parts, all_rows, even_counts),
  'gshard': BalanceLoss(gshard_loss, row_parts, rows_of_micro_batch, even_first_choices),
  'importance': BalanceLoss(
    importance, even_parts, all_rows, no_misfit, seen=importance_seen, linear=False
  ),
  'load': BalanceLoss(smooth_load, even_parts, all_rows, no_noise, seen=load_seen, linear=False),
  'micro_batch': BalanceLoss(row_sets_loss, row_parts, rows_of_micro_batch, even_counts),
  'router_z': BalanceLoss(router_z, token_parts, no_rows, no_misfit),
  'sequence': BalanceLoss(sequence_loss, document_parts, no_rows, even_counts),
  'simbal': BalanceLoss(simbal, token_parts, no_rows, no_misfit),
}

# codebase -> (K, L) to what its coefficient is multiplied by.
CODEBASES: dict[str, Callable[[int, int], float]] = {
  'huggingface': lambda top_k, layers: top_k,
  'levanter': lambda top_k, layers: layers / top_k,
  'maxtext': lambda top_k, layers: top_k,
  'megatron': lambda top_k, layers: layers,
  'olmo_core': lambda top_k, layers: layers,
}
