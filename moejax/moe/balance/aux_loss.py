"""The balance loss that nearly all papers write: mean over sets of tokens of sum_e f_e P_e.

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts, G sets of tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import SCORE_FNS, Routing
from moejax.moe.token_sets import (
  Scope,
  assignment_matrix,
  document_sums,
  exact_mean,
  row_sums,
  total_of,
  zero_padding,
)


def canonical(
  routing: Routing, mask_BS: Array, set_sums: Callable[[Array], Array], scope: Scope
) -> Array:
  """Mean over the sets that hold a token of `sum_e f_e P_e`, a scalar.

  DeepSeek-V3 eq. 17-20; 2501.11873 eq. 2-6.

  f_e = E c_e / sum(c), c a count without gradient: E/(K n) c_e where each of the n tokens has K
  experts. P_e = the mean over the n tokens of p_te, through which the gradient goes to the logits
  of *every* expert. For M groups (DeepSeekMoE, 2401.06066): f the mean over a group's experts, P
  their sum.

  Args:
    routing: of all tokens, masked ones included.
    mask_BS: bool, the tokens that count.
    set_sums: sums [B, S, n] over each set of tokens -> [G, n].
    scope: the switches; its `rows` have already made `set_sums`.
  """
  num_experts = routing.probs.shape[-1]
  counts_BS1 = mask_BS.astype(jnp.int32)[..., None]
  probs_BSE = routing.probs
  if scope.probability:
    # Padding is taken out before: a softmax of NaN would give NaN as the gradient of a 0 behind it.
    logits_BSE = zero_padding(routing.logits, mask_BS)
    probs_BSE = jax.nn.softmax(SCORE_FNS[scope.probability](logits_BSE))
  probs_GE = set_sums(zero_padding(probs_BSE, mask_BS))
  # What f counts and the number of tokens side by side, so that one sum takes both: of integers,
  # which lose no one past 2^24.
  columns = (assigned(routing, mask_BS, scope), counts_BS1)
  counts_GE, tokens_G1 = jnp.split(set_sums(jnp.concatenate(columns, axis=-1)), [num_experts], -1)
  if scope.whole is not None:
    counts_GE = scope.whole + (counts_GE if scope.running else 0)
  groups = scope.partition or num_experts  # M = E: every expert is a group of its own
  probs_GM = probs_GE.reshape(*probs_GE.shape[:-1], groups, -1).sum(-1)
  counts_GM = counts_GE.reshape(*counts_GE.shape[:-1], groups, -1).sum(-1)
  total_G1 = total_of(exact_mean(counts_GM), groups)[..., None]
  # Without a count f is 1, as at balance: nothing is known to be uneven, and so nothing pulls.
  # M times the float: int32 may not hold M times the integer.
  f_GM = groups * counts_GM.astype(jnp.float32) / jnp.maximum(total_G1, 1.0)
  f_GM = jnp.where(total_G1 > 0, f_GM, 1.0)
  loss_G = (jax.lax.stop_gradient(f_GM) * probs_GM / jnp.maximum(tokens_G1, 1.0)).sum(-1)
  return loss_G.sum() / jnp.maximum((tokens_G1 > 0).sum(), 1)


def assigned(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns what f counts, token by token. [B, S, E] i32."""
  expert_ids = ASSIGNMENTS[scope.assignment](routing)
  return assignment_matrix(expert_ids, mask_BS, routing.probs.shape[-1])


def assignment_counts(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns what f counts, summed over all tokens at hand. [E] i32."""
  return assigned(routing, mask_BS, scope).sum((0, 1))


def sequence_loss(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """Balance within each document, DeepSeek-V3 eq. 17-20, as a scalar.

  A packed row is as many sequences as it has documents. For sigmoid scores P is the sigmoid
  normalised over all experts (eq. 19), not a softmax.
  """
  return canonical(routing, mask_BS, lambda values: document_sums(values, segments_BS), scope)


def row_sets_loss(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """Balance within each run of `scope.rows` rows, wherever documents begin and end, as a scalar.

  `micro_batch`: its value depends on how the batch is cut, by definition (Switch Transformer's
  auxiliary loss taken on each micro-batch). `ep_group`: the union of the rows of one
  expert-parallel group; Pangu Ultra MoE (2505.04519) says so in words, and its equation was not at
  hand. `global_batch`: all rows, 2501.11873 eq. 2-6.
  """
  del segments_BS
  return canonical(routing, mask_BS, lambda values: row_sums(values, scope.rows), scope)


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
