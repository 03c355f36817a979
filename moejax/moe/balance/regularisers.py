"""Losses that regularise the router itself: the size of its logits, and how alike its experts are.

Letters: B batch, S sequence, D model, E experts.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import Routing
from moejax.moe.token_sets import Scope, zero_padding


def router_z(routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()) -> Array:
  """Mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906), a scalar.

  It keeps logits small, and says nothing about balance.
  """
  del segments_BS, scope
  logits_BSE = zero_padding(routing.logits, mask_BS)
  z_BS = jnp.square(jax.nn.logsumexp(logits_BSE, axis=-1))
  return zero_padding(z_BS, mask_BS).sum() / jnp.maximum(mask_BS.sum(), 1)


def simbal(routing: Routing, mask_BS: Array, segments_BS: Array, scope: Scope = Scope()) -> Array:
  """|W^T W - I| summed over all entries, W [D, E] the router's weights (SimBal, 2506.14038).

  It pulls the experts' columns to be orthonormal. It does not look at a token: a batch without any
  does not change it.
  """
  del mask_BS, segments_BS, scope
  w_DE = routing.router
  # In true float32, as `router_logits` is: the distance from I is what this measures.
  gram_EE = jnp.einsum('de,df->ef', w_DE, w_DE, precision=jax.lax.Precision.HIGHEST)
  return jnp.abs(gram_EE - jnp.eye(w_DE.shape[1])).sum()
