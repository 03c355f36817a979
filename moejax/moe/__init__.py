"""The Mixture-of-Experts layer: router, selection, dispatch, experts, balance losses, bias rules.

A model of your own can use the layer by itself:

  >>> import jax
  >>> from moejax.moe import BIAS_RULES, MoE, MoEConfig, RouterConfig, Scope, init_bias_state
  >>> cfg = MoEConfig(RouterConfig(num_experts=8, top_k=2, score_fn='sigmoid'), d_expert=64)
  >>> layer = MoE(jax.random.key(0), 32, cfg, scopes={'sequence': Scope()}, bias_rule='sign')
  >>> router = init_bias_state(8)
  >>> x = jax.random.normal(jax.random.key(1), (4, 16, 32))  # [B, S, D], normalised
  >>> y, aux = layer(x, router.bias)
  >>> balance_loss = 0.001 * aux.losses['sequence']  # add it to the loss of the model
  >>> router = BIAS_RULES['sign'].update(router, aux.seen, 0.001, 2)  # after the optimizer's step
  >>> y.shape, aux.load.sum()  # every token goes to top_k experts
  ((4, 16, 32), Array(128, dtype=int32))
"""

from moejax.moe.balance import BALANCE_LOSSES, BalanceConfig
from moejax.moe.bias import BIAS_RULES, BiasState, init_bias_state
from moejax.moe.dispatch import DISPATCHERS, DispatchConfig
from moejax.moe.layer import MoE, MoEAux, MoEConfig
from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route
from moejax.moe.selection import SELECTIONS, Tokens, whole_rows
from moejax.moe.token_sets import Scope

__all__ = [
  'BALANCE_LOSSES',
  'BIAS_RULES',
  'BalanceConfig',
  'BiasState',
  'DISPATCHERS',
  'DispatchConfig',
  'MoE',
  'MoEAux',
  'MoEConfig',
  'RouterConfig',
  'Routing',
  'SCORE_FNS',
  'SELECTIONS',
  'Scope',
  'Tokens',
  'init_bias_state',
  'route',
  'whole_rows',
]
