"""Losses that regularise the router itself: the size of its logits, and how alike its experts are.

Letters: B batch, S sequence, D model, E experts.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import Routing
from moejax.moe.token_sets import Scope


def router_z(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906): keeps logits small; says nothing about balance."""
  del segments, scope
  z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
  return (z * mask).sum() / jnp.maximum(mask.sum(), 1)


def simbal(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """|W^T W - I| summed over all entries, W [D, E] the router's weights (SimBal, 2506.14038): experts' rows orthonormal.

  It does not look at a token: a batch without any does not change it.
  """
  del mask, segments, scope
  w = routing.router
  gram = jnp.einsum('de,df->ef', w, w, precision=jax.lax.Precision.HIGHEST)
  return jnp.abs(gram - jnp.eye(w.shape[1])).sum()
