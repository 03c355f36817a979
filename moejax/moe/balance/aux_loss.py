"""The balance loss that nearly all papers write: mean over sets of tokens of sum_e f_e P_e.

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts, G sets of tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import SCORE_FNS, Routing
from moejax.moe.token_sets import (
  Scope,
  document_counts,
  exact_mean,
  expert_load,
  row_loads,
  row_sums,
  total_of,
  zero_padding,
)


def probabilities(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns p of each token for each group that is balanced, 0 where masked out. [B, S, M] f32."""
  probs_BSE = routing.probs
  if scope.probability:
    # Padding is taken out before: a softmax of NaN would give NaN as the gradient of a 0 behind it.
    logits_BSE = zero_padding(routing.logits, mask_BS)
    probs_BSE = jax.nn.softmax(SCORE_FNS[scope.probability](logits_BSE))
  return in_groups(zero_padding(probs_BSE, mask_BS), scope)


def in_groups(values: Array, scope: Scope) -> Array:
  """Returns the sums over the experts of each group. [..., E] -> [..., M], or E as it is."""
  if not scope.partition:
    return values
  return values.reshape(*values.shape[:-1], scope.partition, -1).sum(-1)


def counted_ids(routing: Routing, scope: Scope) -> Array:
  """Returns the experts that f counts, token by token. [B, S, K] i32."""
  return ASSIGNMENTS[scope.assignment](routing)


def assignment_counts(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns what f counts, summed over all tokens at hand. [E] i32."""
  return expert_load(counted_ids(routing, scope), mask_BS, routing.probs.shape[-1])


def sequence_loss(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """Balance within each document, DeepSeek-V3 eq. 17-20, as a scalar: see `row_sets_loss`.

  A packed row is as many sequences as it has documents. For sigmoid scores P is the sigmoid
  normalised over all experts (eq. 19), not a softmax.

  Since P is a mean over a document's tokens, the sum of f P over documents is one over tokens, each
  with the f of its own document: p is not summed by document, and no difference of sums is taken.
  """

  # What multiplies p is as large as p, and cheap: the backward pass counts anew. Within one layer
  # alone the compiler may find that both count the same, and then no more room is needed.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def of_tokens(probs_BSM: Array, ids_BSK: Array, mask_BS: Array, segments_BS: Array) -> Array:
    groups = probs_BSM.shape[-1]
    counts = document_counts(ids_BSK, mask_BS, segments_BS, groups)
    # Without a count f is 1, as at balance: nothing is known to be uneven, and so nothing pulls.
    is_counted_BS = counts.copies > 0
    count_BSM = jnp.where(is_counted_BS[..., None], counts.experts, 1).astype(jnp.float32)
    total_BS = jnp.where(is_counted_BS, counts.copies, groups).astype(jnp.float32)
    # n f P of a document is the sum of this over its n tokens.
    f_p_BS = groups * (count_BSM * probs_BSM).sum(-1) / total_BS
    return (f_p_BS / jnp.maximum(counts.tokens, 1)).sum() / jnp.maximum(counts.documents, 1)

  ids_BSK = counted_ids(routing, scope)
  if scope.partition:
    # An unassigned id, E or more, becomes M or more.
    ids_BSK = ids_BSK // (routing.probs.shape[-1] // scope.partition)
  return of_tokens(probabilities(routing, mask_BS, scope), ids_BSK, mask_BS, segments_BS)


def row_sets_loss(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """Balance within each run of `scope.rows` rows, wherever documents begin and end, as a scalar.

  Mean over the sets that hold a token of `sum_e f_e P_e`: DeepSeek-V3 eq. 17-20; 2501.11873
  eq. 2-6.

  f_e = E c_e / sum(c), c a count without gradient: E/(K n) c_e where each of the n tokens has K
  experts. P_e = the mean over the n tokens of p_te, through which the gradient goes to the logits
  of *every* expert. For M groups (DeepSeekMoE, 2401.06066): f the mean over a group's experts, P
  their sum.

  `micro_batch`: its value depends on how the batch is cut, by definition (Switch Transformer's
  auxiliary loss taken on each micro-batch). `ep_group`: the union of the rows of one
  expert-parallel group; Pangu Ultra MoE (2505.04519) says so in words, and its equation was not at
  hand. `global_batch`: all rows, 2501.11873 eq. 2-6.

  Args:
    routing: of all tokens, masked ones included.
    mask_BS: bool, the tokens that count.
    segments_BS: not looked at.
    scope: the switches.
  """
  del segments_BS
  num_experts = routing.probs.shape[-1]
  probs_GM = row_sums(probabilities(routing, mask_BS, scope), scope.rows)
  # Counts are integers until they are divided, which lose no one past 2^24.
  tokens_G1 = row_sums(mask_BS.astype(jnp.int32)[..., None], scope.rows)
  counts_BE = row_loads(counted_ids(routing, scope), mask_BS, num_experts)
  counts_GE = row_sums(counts_BE[:, None], scope.rows)
  if scope.whole is not None:
    counts_GE = scope.whole + (counts_GE if scope.running else 0)
  counts_GM = in_groups(counts_GE, scope)
  groups = scope.partition or num_experts  # M = E: every expert is a group of its own
  total_G1 = total_of(exact_mean(counts_GM), groups)[..., None]
  # Without a count f is 1, as at balance: nothing is known to be uneven, and so nothing pulls.
  # M times the float: int32 may not hold M times the integer.
  f_GM = groups * counts_GM.astype(jnp.float32) / jnp.maximum(total_G1, 1.0)
  f_GM = jnp.where(total_G1 > 0, f_GM, 1.0)
  loss_G = (jax.lax.stop_gradient(f_GM) * probs_GM / jnp.maximum(tokens_G1, 1.0)).sum(-1)
  return loss_G.sum() / jnp.maximum((tokens_G1 > 0).sum(), 1)


def gshard_loss(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """GShard (2006.16668), Algorithm 1 from memory: f counts first choices alone, as a scalar.

  A micro-batch is its group. Its 1/E sum_e (c_e / S) m_e is ours over E^2, so that ours, too, is 1
  at balance.
  """
  return row_sets_loss(routing, mask_BS, segments_BS, scope._replace(assignment='first'))


# name -> routing to the expert_ids that f counts.
ASSIGNMENTS: dict[str, Callable[[Routing], Array]] = {
  'dispatched': lambda routing: routing.expert_ids,
  'first': lambda routing: routing.expert_ids[..., :1],
  'unbiased': lambda routing: routing.best_ids,
}
