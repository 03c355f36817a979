"""The MoE layer: router -> dispatch (+ shared experts) -> (y, MoEAux).

Letters: B batch, S sequence, D model, E experts, K experts per token.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.config import check, frozendict
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.experts.ffn import ACTIVATIONS, SwiGLU
from moejax.moe.experts.weights import Experts
from moejax.moe.routing import RouterConfig, Routing, route, router_logits
from moejax.moe.selection import SELECTIONS, Tokens, jittered, whole_rows
from moejax.moe.statistics import Stats, observe
from moejax.moe.token_sets import Scope, expert_load
from moejax.sharding.params import constant_init, normal_init, param


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """`d_expert` is the hidden width of a routed expert; `num_shared` experts of that width see every token.

  shared_gate: what the shared experts give is multiplied by the sigmoid of a learnt projection (Qwen2-MoE).
  activation, expert_bias: of the routed experts. `activation_limit` is where 'clamped_swiglu' (gpt-oss) clamps.
  """

  router: RouterConfig = RouterConfig()
  dispatch: DispatchConfig = DispatchConfig()
  d_expert: int = 512
  num_shared: int = 0
  shared_gate: bool = False
  activation: str = 'swiglu'
  activation_limit: float = 7.0
  expert_bias: bool = False

  def __post_init__(self) -> None:
    check(
      f'd_expert={self.d_expert}: use 1 or more' if self.d_expert < 1 else '',
      f'num_shared={self.num_shared}: use 0 (no shared expert) or more'
      if self.num_shared < 0
      else '',
      'shared_gate=True with num_shared=0: use 1 or more'
      if self.shared_gate and not self.num_shared
      else '',
      f'activation={self.activation!r} is not one of {sorted(ACTIVATIONS)}'
      if self.activation not in ACTIVATIONS
      else '',
      f'activation_limit={self.activation_limit}: use a number above 0'
      if self.activation == 'clamped_swiglu' and not self.activation_limit > 0
      else '',
      f"dispatch.capacity_factor={self.dispatch.capacity_factor} limits experts that selection='expert_choice' has "
      'already filled: use capacity_factor=0'
      if self.dispatch.capacity_factor > 0 and self.router.selection == 'expert_choice'
      else '',
    )


def causality(cfg: MoEConfig) -> list[str]:
  """In words, where what a token gets depends on more than the tokens before it in its row; for most layers nothing."""
  found = []
  if not SELECTIONS[cfg.router.selection].causal:
    found.append(
      f'no: with selection={cfg.router.selection!r} a later token can change an earlier one'
    )
  if cfg.dispatch.capacity_factor > 0:
    found.append(
      'no: full experts drop copies by score, so a later token can change an earlier one'
      if cfg.dispatch.drop_by == 'probs'
      else 'yes within a row: full experts drop the last copies, so a row depends on the rows before it'
    )
  return found


class MoEAux(NamedTuple):
  """What a layer learnt; scan stacks it over layers."""

  load: Array  # [E] f32  copies dispatched, of tokens that count
  seen: Array  # what the bias rule observes; without a rule the load
  whole: dict[
    str, Array
  ]  # loss -> [E], what losses whose sets are larger than this micro-batch see of it
  losses: dict[str, Array]  # name -> scalar, without coefficient
  dropped: Array  # scalar f32, fraction of the copies
  stats: Stats  # sums for statistics
  expert_ids: Array  # [B, S, K] i32


class MoE(nnx.Module):
  """A router, E experts of which each token sees K, and shared ones that it always sees.

  scopes: balance loss -> Scope, the losses to compute; Scope() takes all rows at hand as one set.
  bias_rule: a row of BIAS_RULES, which then observes every batch; '' for none.
  std, out_std: of the normal distribution that matrices start from, and of `down`'s; out_std=0: std.
  """

  def __init__(
    self,
    key: Array,
    d_model: int,
    cfg: MoEConfig = MoEConfig(),
    scopes: Mapping[str, Scope] = frozendict(),
    bias_rule: str = '',
    std: float = 0.02,
    out_std: float = 0.0,
  ) -> None:
    self.cfg, self.scopes, self.bias_rule = cfg, frozendict(scopes), bias_rule
    out_std = out_std or std
    num_experts = cfg.router.num_experts
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    self.router = param(router_key, (d_model, num_experts), ('embed', ''), normal_init(std))
    if cfg.router.noisy:
      # From zero: the noise begins at softplus(0) = 0.69 for every expert.
      self.noise = param(router_key, (d_model, num_experts), ('embed', ''), normal_init(0.0))
    if cfg.router.logit_bias:
      self.router_logit_bias = param(key, (num_experts,), ('norm',), constant_init(0.0))
    self.experts = Experts(
      experts_key,
      num_experts,
      d_model,
      cfg.d_expert,
      std=std,
      out_std=out_std,
      bias=cfg.expert_bias,
    )
    if cfg.num_shared:
      self.shared = SwiGLU(shared_key, d_model, cfg.num_shared * cfg.d_expert, std, out_std)
    if cfg.shared_gate:
      gate_key = jax.random.fold_in(key, 3)
      self.shared_gate = param(gate_key, (d_model, 1), ('embed', ''), normal_init(std))

  def route(self, x: Array, bias: Array, tokens: Tokens) -> Routing:
    """x [B, S, D] normalised, bias [E] f32 -> the routing of all tokens, padding included."""
    cfg, w = self.cfg.router, self.router[...]
    x = jittered(x, tokens, cfg.jitter)
    noise_std = jax.nn.softplus(router_logits(x, self.noise[...])) if cfg.noisy else None
    logits = router_logits(x, w)
    if cfg.logit_bias:
      logits = logits + self.router_logit_bias[...]
    routing = route(logits, jax.lax.stop_gradient(bias), cfg, tokens, noise_std)
    return routing._replace(router=w)

  def __call__(
    self,
    x: Array,
    bias: Array | None = None,
    tokens: Tokens | None = None,
    whole: Mapping[str, Array] | None = frozendict(),
  ) -> tuple[Array, MoEAux]:
    """x [B, S, D] normalised -> y [B, S, D] and the aux. Padding gets 0 from the routed experts.

    bias: [E] f32, added to the scores where experts are chosen; None: zeros.
    tokens: which of them count, and of which document they are; None: all, a document a row.
    whole: loss -> [E] f32, what `BalanceLoss.seen` sums over the whole set, for losses whose sets are
      larger than x; None where nothing is trained: no losses.
    """
    num_experts = self.cfg.router.num_experts
    bias = jnp.zeros(num_experts) if bias is None else bias
    tokens = whole_rows(*x.shape[:2]) if tokens is None else tokens
    routing = self.route(x, bias, tokens)
    y, dropped = self.mixture(x, routing, tokens)
    losses, seen = self.balance(routing, tokens, whole)
    load = expert_load(routing.expert_ids, tokens.mask, num_experts)
    observed = load
    if self.bias_rule:
      observed = BIAS_RULES[self.bias_rule].observe(routing, bias, tokens.mask)
    return y, MoEAux(
      load=load,
      seen=observed,
      whole=jax.lax.stop_gradient(seen),
      losses=losses,
      dropped=dropped,
      stats=observe(routing, routing.best_ids, tokens.mask),
      expert_ids=routing.expert_ids,
    )

  def mixture(self, x: Array, routing: Routing, tokens: Tokens) -> tuple[Array, Array]:
    """What the experts make of the tokens, [B, S, D], and the fraction of copies that were dropped."""
    cfg = self.cfg
    # Padding is sent to no expert, whatever its routing says.
    dispatch_ids = jnp.where(tokens.mask[..., None], routing.expert_ids, cfg.router.num_experts)
    dispatch = DISPATCHERS[cfg.dispatch.dispatcher]
    activation = ACTIVATIONS[cfg.activation](cfg.activation_limit)
    weights = self.experts.weights(x.dtype)
    y, dropped = dispatch(
      x, routing._replace(expert_ids=dispatch_ids), weights, activation, cfg.dispatch
    )
    if cfg.shared_gate:
      gate = jax.nn.sigmoid(router_logits(x, self.shared_gate[...]))
      return y + gate.astype(x.dtype) * self.shared(x), dropped
    if cfg.num_shared:
      return y + self.shared(x), dropped
    return y, dropped

  def balance(
    self, routing: Routing, tokens: Tokens, whole: Mapping[str, Array] | None
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """The losses of `scopes`, without coefficients, and what those of larger sets see of this batch."""
    losses: dict[str, Array] = {}
    seen: dict[str, Array] = {}
    if whole is None:
      return losses, seen
    for name, scope in self.scopes.items():
      loss = BALANCE_LOSSES[name]
      if scope.rows > tokens.mask.shape[0]:
        seen[name] = loss.seen(routing, tokens.mask, scope)
        scope = scope._replace(whole=whole[name])
      losses[name] = loss.value(routing, tokens.mask, tokens.segments, scope)
    return losses, seen
