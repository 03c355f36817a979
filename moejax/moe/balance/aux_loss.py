"""The balance loss that nearly all papers write: sum_e f_e P_e over a set of tokens, and its mean over sets.

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts, G sets of tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import SCORE_FNS, Routing
from moejax.moe.token_sets import Scope, assignment_matrix, document_sums, row_sums


def canonical(
  routing: Routing, mask: Array, set_sums: Callable[[Array], Array], scope: Scope
) -> Array:
  """Mean over the sets that hold a token of `sum_e f_e P_e` (DeepSeek-V3 eq. 17-20; 2501.11873 eq. 2-6).

  f_e = E c_e / sum(c), c a count without gradient: E/(K n) c_e where each of the n tokens has K experts. P_e = the mean
  over the n tokens of p_te, through which the gradient goes to the logits of *every* expert. For M groups (DeepSeekMoE,
  2401.06066): f the mean over a group's experts, P their sum.
  """
  num_experts = routing.probs.shape[-1]
  weight = mask.astype(jnp.float32)[..., None]
  probs = (
    jax.nn.softmax(SCORE_FNS[scope.probability](routing.logits))
    if scope.probability
    else routing.probs
  )
  sums = set_sums(
    jnp.concatenate([probs * weight, assigned(routing, mask, scope), weight], axis=-1)
  )  # [G, 2E + 1]
  probs, counts, tokens = jnp.split(sums, [num_experts, 2 * num_experts], axis=-1)
  if scope.whole is not None:
    counts = scope.whole + (counts if scope.running else 0.0)
  groups = scope.partition or num_experts
  probs, counts = (a.reshape(*a.shape[:-1], groups, -1).sum(-1) for a in (probs, counts))
  total = counts.sum(-1, keepdims=True)
  f = jnp.where(total > 0, groups * counts / jnp.maximum(total, 1.0), 1.0)
  per_set = (jax.lax.stop_gradient(f) * probs / jnp.maximum(tokens, 1.0)).sum(-1)
  return per_set.sum() / jnp.maximum((tokens > 0).sum(), 1)


def assigned(routing: Routing, mask: Array, scope: Scope) -> Array:
  """What f counts, token by token. [B, S, E] f32."""
  return assignment_matrix(ASSIGNMENTS[scope.assignment](routing), mask, routing.probs.shape[-1])


def assignment_counts(routing: Routing, mask: Array, scope: Scope) -> Array:
  """What f counts, of all tokens at hand. [E] f32."""
  return assigned(routing, mask, scope).sum((0, 1))


def sequence_loss(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Balance within each document, DeepSeek-V3 eq. 17-20: a packed row is as many sequences as it has documents.

  For sigmoid scores P is the sigmoid normalised over all experts (eq. 19), not a softmax.
  """
  return canonical(routing, mask, lambda values: document_sums(values, segments), scope)


def row_sets_loss(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Balance within each run of `scope.rows` rows, wherever documents begin and end.

  `micro_batch`: its value depends on how the batch is cut, by definition (Switch Transformer's auxiliary loss taken on
  each micro-batch). `ep_group`: the union of the rows of one expert-parallel group; Pangu Ultra MoE (2505.04519) says
  so in words, and its equation was not at hand. `global_batch`: all rows, 2501.11873 eq. 2-6.
  """
  del segments
  return canonical(routing, mask, lambda values: row_sums(values, scope.rows), scope)


def gshard_loss(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """GShard (2006.16668), Algorithm 1 from memory: f counts first choices alone; a micro-batch is its group.

  Its 1/E sum_e (c_e / S) m_e is ours over E^2, so that ours, too, is 1 at balance.
  """
  return row_sets_loss(routing, mask, segments, scope._replace(assignment='first'))


# name -> routing to the expert_ids that f counts.
ASSIGNMENTS: dict[str, Callable[[Routing], Array]] = {
  'dispatched': lambda routing: routing.expert_ids,
  'first': lambda routing: routing.expert_ids[..., :1],
  'unbiased': lambda routing: routing.best_ids,
}
