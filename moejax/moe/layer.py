"""The MoE layer: router -> dispatch (+ shared experts) -> (y, MoEAux).

Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from moejax.config import check, frozendict
from moejax.layers import SwiGLU, normal, param
from moejax.moe.balance import BALANCE_LOSSES, counted_ids, load
from moejax.moe.dispatch import DISPATCHERS, DispatchConfig
from moejax.moe.experts import Experts
from moejax.moe.routing import RouterConfig, route, router_logits


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """`d_expert` is the hidden width of a routed expert; `num_shared` experts of that width see every token."""

  router: RouterConfig = RouterConfig()
  dispatch: DispatchConfig = DispatchConfig()
  d_expert: int = 512
  num_shared: int = 0

  def __post_init__(self) -> None:
    check(
      f'd_expert={self.d_expert}: use 1 or more' if self.d_expert < 1 else '',
      f'num_shared={self.num_shared}: use 0 (no shared expert) or more' if self.num_shared < 0 else '',
    )


class Tokens(NamedTuple):
  """Which tokens count, and what their balance losses must know of the rest of the batch."""

  mask: Array                # [B, S] bool, False for padding
  segments: Array            # [B, S] i32, document of each token in its row
  set_loads: dict[str, Array]  # loss -> [E] f32, for losses whose sets span micro-batches


class MoEAux(NamedTuple):
  """What a layer learnt; scan stacks it over layers."""

  load: Array                # [E] f32  copies dispatched, of tokens that count
  counted: Array             # [E] f32  copies that f of the balance losses counts
  losses: dict[str, Array]   # name -> scalar, without coefficient
  dropped: Array             # scalar f32, fraction of the copies


class MoE(nnx.Module):
  """A router, E experts of which each token sees K, and shared ones that it always sees.

  scopes: loss -> Scope, the losses to compute; assignment: what their f counts (see BalanceConfig).
  """

  def __init__(self, key: Array, d_model: int, cfg: MoEConfig, scopes: frozendict, std: float) -> None:
    keys = jax.random.split(key, 3)
    self.cfg, self.scopes = cfg, scopes
    assignments = {scope.assignment for scope in scopes.values()} or {'dispatched'}
    self.assignment, = assignments
    self.router = param(keys[0], (d_model, cfg.router.num_experts), ('embed', ''), normal(std))
    self.experts = Experts(keys[1], cfg.router.num_experts, d_model, cfg.d_expert, std)
    if cfg.num_shared:
      self.shared = SwiGLU(keys[2], d_model, cfg.num_shared * cfg.d_expert, std)

  def __call__(self, x: Array, bias: Array, tokens: Tokens) -> tuple[Array, MoEAux]:
    """x [B, S, D] normalised, bias [E] f32 -> y [B, S, D] and the aux. Padding gets 0 from the routed experts."""
    cfg, num_experts = self.cfg, self.cfg.router.num_experts
    routing = route(router_logits(x, self.router[...]), jax.lax.stop_gradient(bias), cfg.router)
    somebody = jnp.where(tokens.mask[..., None], routing.expert_ids, num_experts)
    y, dropped = DISPATCHERS[cfg.dispatch.dispatcher](
      x, routing._replace(expert_ids=somebody), self.experts.weights(x.dtype), cfg.dispatch)
    if cfg.num_shared:
      y = y + self.shared(x)
    losses = {}
    for name, scope in self.scopes.items():
      scope = scope._replace(load=tokens.set_loads[name]) if name in tokens.set_loads else scope
      losses[name] = BALANCE_LOSSES[name].value(routing, tokens.mask, tokens.segments, scope)
    used, counted = (load(ids, tokens.mask, num_experts)
                     for ids in (routing.expert_ids, counted_ids(routing, self.assignment)))
    return y, MoEAux(used, counted, losses, dropped)
