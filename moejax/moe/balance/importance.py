"""Losses of how much a sum over a set varies between experts: importance and smooth load.

Letters: B batch, S sequence, E experts, K experts per token, G sets of tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import Routing
from moejax.moe.token_sets import (
  Scope,
  masked_ids,
  parts_of_set,
  put_at_experts,
  row_sums,
  zero_padding,
)

# A mean below it is taken for nothing: it is near the smallest normal float32, 1.2e-38.
SMALLEST_SUM = 1e-37


def variation(sums_GE: Array) -> Array:
  """Squared coefficient of variation over experts, (std / mean)^2 with the population's std. [G].

  0 when all are equal, E - 1 when one has everything; 0 also where there is nothing.
  """
  mean_G1 = sums_GE.mean(-1, keepdims=True)
  something_G1 = mean_G1 > SMALLEST_SUM
  # It does not depend on the scale, so sums are brought near 1 first: the gradient of sums / mean
  # is over mean^2, which underflows for sums of 1e-20.
  sums_GE = sums_GE / jax.lax.stop_gradient(jnp.where(something_G1, mean_G1, 1.0))
  # Both branches of a `where` are differentiated: the inner one keeps a division by 0, whose
  # gradient is NaN, out of the branch that is not taken.
  divisor_G1 = jnp.where(something_G1, sums_GE.mean(-1, keepdims=True), 1.0)
  away_GE = jnp.where(something_G1, sums_GE / divisor_G1 - 1.0, 0.0)
  return jnp.square(away_GE).mean(-1)  # of what is away, not E[x^2] - 1: that cancels


def of_sets(sums_BE: Array, mask_BS: Array, scope: Scope) -> Array:
  """Mean over the sets that hold a token of the variation of their sums, a scalar.

  Where a set is spread over m micro-batches, its variation is that of the whole, and the gradient
  of this part is m times that of its own tokens: each part counts 1/m (`even_parts`), and they add
  up to the gradient of the whole.

  Args:
    sums_BE: what varies, summed over each row's tokens that count.
    mask_BS: bool, the tokens that count.
    scope: the switches.
  """
  sums_GE = row_sums(sums_BE[:, None], scope.rows)
  if scope.whole is None:
    tokens_G = row_sums(mask_BS[..., None].astype(jnp.float32), scope.rows)[:, 0]
    return variation(sums_GE).sum() / jnp.maximum((tokens_G > 0).sum(), 1)
  parts = parts_of_set(scope.rows, mask_BS.shape[0])
  # The difference is exactly 0: the value is that of `whole`, the gradient that of these sums.
  own_GE = sums_GE - jax.lax.stop_gradient(sums_GE)
  return variation(scope.whole + parts * own_GE)[0]


def gate_sums(routing: Routing, mask_BS: Array) -> Array:
  """Returns the sums of the gates over each row's tokens that count. [B, E] f32.

  A gate G_te is the weight of expert e for token t, 0 where it was not chosen.
  """
  num_experts, rows = routing.probs.shape[-1], len(mask_BS)
  ids_BSK = masked_ids(routing.expert_ids, mask_BS, num_experts)
  # A row's copies as those of one token.
  weights_BN, ids_BN = (a.reshape(rows, -1) for a in (routing.weights, ids_BSK))
  return put_at_experts(weights_BN, ids_BN, num_experts)


def likely_sums(routing: Routing, mask_BS: Array) -> Array:
  """Returns the load that each expert may expect of each row's tokens that count. [B, E] f32."""
  return zero_padding(routing.likely, mask_BS).sum(1)


def importance(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """CV^2 over experts of the gates' sums, a scalar: Shazeer et al. 2017 (1701.06538), L_importance.

  Their weight is 0.1. Its square, as in their text, and as derived here from the words: no equation
  number was at hand. 0 at balance.
  """
  del segments_BS
  return of_sets(gate_sums(routing, mask_BS), mask_BS, scope)


def smooth_load(
  routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()
) -> Array:
  """CV^2 over experts of how many tokens each may expect: Shazeer et al. 2017, L_load. A scalar.

  Needs noisy top-k: P(e is chosen | the others' noise) is smooth in the logits, so that a load,
  unlike a count, has a gradient.
  """
  del segments_BS
  return of_sets(likely_sums(routing, mask_BS), mask_BS, scope)


def importance_seen(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns the sums of the gates over a micro-batch's tokens that count. [E] f32."""
  del scope
  return gate_sums(routing, mask_BS).sum(0)


def load_seen(routing: Routing, mask_BS: Array, scope: Scope) -> Array:
  """Returns the load that each expert may expect of a micro-batch's tokens that count. [E] f32."""
  del scope
  return likely_sums(routing, mask_BS).sum(0)
