"""Losses on a router that are not f times P: how sums over a set vary, how large logits are, how alike experts are.

Letters: B batch, S sequence, D model, E experts, K experts per token, G sets of tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import Routing
from moejax.moe.token_sets import Scope, parts_of_set, row_sums


def variation(sums: Array) -> Array:
  """Squared coefficient of variation over experts, (std / mean)^2 with the population's std. [G, E] -> [G].

  0 when all are equal, E - 1 when one has everything; 0 also where there is nothing. It does not depend on the scale,
  so sums are brought near 1 first: the gradient of sums / mean is over mean^2, which underflows for sums of 1e-20.
  """
  mean = sums.mean(-1, keepdims=True)
  something = mean > 1e-37
  sums = sums / jax.lax.stop_gradient(jnp.where(something, mean, 1.0))
  away = jnp.where(
    something, sums / jnp.where(something, sums.mean(-1, keepdims=True), 1.0) - 1.0, 0.0
  )
  return jnp.square(away).mean(-1)  # of what is away, not E[x^2] - 1: that cancels


def of_sets(values: Array, mask: Array, scope: Scope) -> Array:
  """Mean over the sets that hold a token of the variation of their sums. values [B, S, E] -> scalar.

  Where a set is spread over m micro-batches, its variation is that of the whole, and the gradient of this part is m
  times that of its own tokens: each part counts 1/m (`even_parts`), and they add up to the gradient of the whole.
  """
  sums = row_sums(values * mask[..., None], scope.rows)
  if scope.whole is None:
    tokens = row_sums(mask[..., None].astype(jnp.float32), scope.rows)[:, 0]
    return variation(sums).sum() / jnp.maximum((tokens > 0).sum(), 1)
  parts = parts_of_set(scope.rows, mask.shape[0])
  return variation(scope.whole + parts * (sums - jax.lax.stop_gradient(sums)))[0]


def gates(routing: Routing) -> Array:
  """G_te: the weight of expert e for token t, 0 where it was not chosen. [B, S, E]."""
  return jnp.einsum(
    'bske,bsk->bse', jax.nn.one_hot(routing.expert_ids, routing.probs.shape[-1]), routing.weights
  )


def importance(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """CV^2 over experts of the gates' sums: Shazeer et al. 2017 (1701.06538), L_importance; their weight is 0.1.

  Its square, as in their text, and as derived here from the words: no equation number was at hand. 0 at balance.
  """
  del segments
  return of_sets(gates(routing), mask, scope)


def smooth_load(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """CV^2 over experts of how many tokens each may expect: Shazeer et al. 2017, L_load. Needs noisy top-k.

  P(e is chosen | the others' noise) is smooth in the logits, so that a load, unlike a count, has a gradient.
  """
  del segments
  return of_sets(routing.likely, mask, scope)


def importance_seen(routing: Routing, mask: Array, scope: Scope) -> Array:
  """The gates' sums of a micro-batch, [E]."""
  del scope
  return row_sums(gates(routing) * mask[..., None], 0)[0]


def load_seen(routing: Routing, mask: Array, scope: Scope) -> Array:
  """The expected load of a micro-batch, [E]."""
  del scope
  return row_sums(routing.likely * mask[..., None], 0)[0]
