"""The MoE layer: router -> dispatch (+ shared experts) -> (y, MoEAux).

Names of arrays may end in their shape: `x_BSD` is [B, S, D].
Letters: B batch, S sequence, D model, E experts, K experts per token, L layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.config import at_least, check, frozendict, not_finite, not_one_of, problem_if
from moejax.moe.balance.fit import asked_problems, untrainable
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts.ffn import ACTIVATIONS, SwiGLU
from moejax.moe.experts.weights import Experts
from moejax.moe.input_checks import (
  expect_bias,
  expect_input,
  expect_mesh_axes,
  expect_tokens,
  expect_whole,
)
from moejax.moe.routing import RouterConfig, Routing, route, router_logits
from moejax.moe.saved_names import EXPERTS, ROUTER
from moejax.moe.selection import SELECTIONS, Tokens, jittered, whole_rows
from moejax.moe.statistics import Stats, observe
from moejax.moe.token_sets import Scope, expert_load, masked_ids, zero_padding
from moejax.sharding.params import constant_init, normal_init, param


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The switches of an MoE layer besides those of its router and dispatcher.

  d_expert: hidden width of a routed expert.
  num_shared: how many shared experts see every token.
  d_shared: hidden width of a shared expert; 0: that of a routed one, `d_expert`.
  shared_gate: the shared experts' output is multiplied by the sigmoid of a learnt projection of x
    (Qwen2-MoE).
  activation, expert_bias: of the routed experts.
  activation_limit: where 'clamped_swiglu' (gpt-oss) clamps.
  """

  router: RouterConfig = RouterConfig()
  dispatch: DispatchConfig = DispatchConfig()
  d_expert: int = 512
  num_shared: int = 0
  d_shared: int = 0
  shared_gate: bool = False
  activation: str = 'swiglu'
  activation_limit: float = 7.0
  expert_bias: bool = False

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      *at_least(1, self, 'd_expert'),
      *at_least(0, self, 'num_shared', meaning='no shared expert'),
      *at_least(0, self, 'd_shared', meaning='d_expert'),
      *(
        f'{name}={getattr(self, name)} with num_shared=0: use num_shared=1 or more'
        for name in ('d_shared', 'shared_gate')
        if getattr(self, name) and not self.num_shared
      ),
      not_one_of('activation', self.activation, ACTIVATIONS),
      problem_if(
        self.activation == 'clamped_swiglu' and not self.activation_limit > 0,
        f'activation_limit={self.activation_limit}: use a number above 0',
      ),
      problem_if(
        self.dispatch.capacity_factor > 0 and self.router.selection == 'expert_choice',
        f'dispatch.capacity_factor={self.dispatch.capacity_factor} limits experts that '
        "selection='expert_choice' has already filled: use capacity_factor=0",
      ),
    )

  @property
  def shared_width(self) -> int:
    """The hidden units of all shared experts together; 0 without one."""
    return self.num_shared * (self.d_shared or self.d_expert)


def causality(cfg: MoEConfig) -> list[str]:
  """Says where outputs depend on more than the tokens before them in a row; [] for most layers.

  In training: where nothing is trained nothing is dropped, and only a selection can be at fault.
  """
  reasons = []
  if not SELECTIONS[cfg.router.selection].causal:
    reasons.append(
      f'no: with selection={cfg.router.selection!r} a later token can change an earlier one'
    )
  if cfg.dispatch.capacity_factor > 0 and cfg.dispatch.drop_by == 'probs':
    reasons.append(
      'no: full experts drop copies by score, so a later token can change an earlier one'
    )
  elif cfg.dispatch.capacity_factor > 0:
    reasons.append(
      'yes within a row: full experts drop the last copies, so a row depends on the rows before it'
    )
  return reasons


class MoEAux(NamedTuple):
  """What a layer learnt besides its output; a scan over layers stacks it to [L, ...]."""

  load: Array  # [E] i32  copies dispatched, of tokens that count
  seen: Array  # what the bias rule observes, see `BiasRule`; without a rule the load
  # loss -> [E], what losses whose sets are larger than this micro-batch see of it: added up
  # over the set, it comes back as the argument `whole` of a later pass
  whole: dict[str, Array]
  losses: dict[str, Array]  # name -> scalar f32, without coefficient
  dropped: Array  # scalar f32, fraction of the copies
  stats: Stats  # sums over the tokens that count, for statistics
  expert_ids: Array  # [B, S, K] i32


def layer_problems(cfg: MoEConfig, scopes: Mapping[str, Scope], bias_rule: str) -> list[str]:
  """What a layer cannot be built of, '' for each thing that it can."""
  if not isinstance(cfg, MoEConfig):
    return [f'cfg={cfg!r}: use an MoEConfig, which holds the RouterConfig']
  return asked_problems(cfg.router, scopes, bias_rule)


class MoE(nnx.Module):
  """A router, E experts of which each token sees K, and shared ones that it always sees.

  key: initialises the parameters.
  d_model: D, the width of x and of y.
  scopes: balance loss -> Scope, the losses to compute; Scope() takes all rows at hand as one set.
  bias_rule: a row of BIAS_RULES, which then observes every batch; '' for none.
  std, out_std: standard deviation that matrices start with, and that `down` starts with, which
    writes to the residual; out_std=0: std.

  Raises:
    ConfigError: `cfg`, a name in `scopes` or `bias_rule` is not what the layer takes, or a loss or
      the rule would do nothing for this router.
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
    check(*layer_problems(cfg, scopes, bias_rule))
    self.cfg, self.scopes, self.bias_rule = cfg, frozendict(scopes), bias_rule
    num_experts = cfg.router.num_experts
    router_key, experts_key, shared_key = jax.random.split(key, 3)
    self.router = param(router_key, (d_model, num_experts), ('embed', ''), normal_init(std))
    # A switch must not change how other parameters start: what is optional takes no key from the
    # split above, but one that is used already where it starts at 0, or one folded in.
    if cfg.router.noisy:
      # From zero: the noise begins at softplus(0) = 0.69 for every expert.
      self.noise = param(router_key, (d_model, num_experts), ('embed', ''), normal_init(0.0))
    if cfg.router.logit_bias:
      self.router_logit_bias = param(key, (num_experts,), ('norm',), constant_init(0.0))
    stds = {'std': std, 'out_std': out_std or std}
    self.experts = Experts(
      experts_key, num_experts, d_model, cfg.d_expert, bias=cfg.expert_bias, **stds
    )
    if cfg.num_shared:
      # One SwiGLU as wide as all shared experts side by side gives the sum of their outputs.
      self.shared = SwiGLU(shared_key, d_model, cfg.shared_width, **stds)
    if cfg.shared_gate:
      gate_key = jax.random.fold_in(key, 3)
      self.shared_gate = param(gate_key, (d_model, 1), ('embed', ''), normal_init(std))

  def route(self, x_BSD: Array, bias_E: Array, tokens: Tokens) -> Routing:
    """x normalised, bias f32 -> the routing of all tokens, padding included."""
    cfg, w_DE = self.cfg.router, self.router[...]
    x_BSD = jittered(x_BSD, tokens, cfg.jitter)
    noise_std_BSE = None
    if cfg.noisy:
      noise_std_BSE = jax.nn.softplus(router_logits(x_BSD, self.noise[...]))
    logits_BSE = checkpoint_name(router_logits(x_BSD, w_DE), ROUTER)
    if cfg.logit_bias:
      logits_BSE = logits_BSE + self.router_logit_bias[...]
    # The rule moves the bias, and nothing else does: no gradient reaches it.
    routing = route(logits_BSE, jax.lax.stop_gradient(bias_E), cfg, tokens, noise_std_BSE)
    return routing._replace(router=w_DE)  # SimBal looks at the weights themselves

  def __call__(
    self,
    x: Array,
    bias: Array | None = None,
    tokens: Tokens | None = None,
    whole: Mapping[str, Array] | None = frozendict(),
  ) -> tuple[Array, MoEAux]:
    """x [B, S, D] normalised -> y [B, S, D] and the aux. Padding gets 0.

    Args:
      x: of a floating dtype, which is also that of y; what the router does is float32.
      bias: [E] f32, added to the scores where experts are chosen; None: zeros.
      tokens: which of them count, and of which document they are; None: all, a document a row.
      whole: loss -> [E], what `BalanceLoss.seen` sums over the whole set, for losses whose sets
        are larger than x; None where nothing is trained: no losses and no capacity, see `dropless`.

    What padding holds, NaN or not, reaches neither y nor aux nor a gradient: it is taken for 0.

    Raises:
      ConfigError: the layer is trained, and its router cannot be, see `untrainable`.
      ValueError: an argument has another shape or dtype, hash selection is given no ids, the mesh
        that is set lacks an axis, a loss has sets larger than x and `whole` does not hold it, or
        its sets are no whole number of parts of x, or the other way round.
    """
    x = jnp.asarray(x)
    expect_input(x, self.router.shape[0])
    expect_mesh_axes()
    num_experts = self.cfg.router.num_experts
    bias = jnp.zeros(num_experts) if bias is None else jnp.asarray(bias)
    tokens = whole_rows(jnp.ones(x.shape[:2], bool)) if tokens is None else tokens
    expect_bias(bias, num_experts)
    expect_tokens(tokens, x.shape[:2])
    if whole is not None:
      remedy = ', or whole=None where nothing is trained'
      why = untrainable(self.cfg.router)
      check(problem_if(why, why + remedy))
    x = zero_padding(x, tokens.mask)
    routing = self.route(x, bias, tokens)
    # Where nothing is trained nothing is dropped, or rows would change each other.
    dispatch = dropless(self.cfg.dispatch) if whole is None else self.cfg.dispatch
    y, dropped = self.mixture(x, routing, tokens, dispatch)
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

  def mixture(
    self, x_BSD: Array, routing: Routing, tokens: Tokens, dispatch: DispatchConfig
  ) -> tuple[Array, Array]:
    """Returns the experts' output y [B, S, D], and the fraction of copies that were dropped."""
    cfg = self.cfg
    # Padding is sent to no expert, whatever its routing says: id E is unassigned.
    sent_BSK = masked_ids(routing.expert_ids, tokens.mask, cfg.router.num_experts)
    activation = ACTIVATIONS[cfg.activation](cfg.activation_limit)
    weights = self.experts.weights(x_BSD.dtype)
    routing = routing._replace(expert_ids=sent_BSK)
    experts_choose = SELECTIONS[cfg.router.selection].experts_choose
    y_BSD, dropped = DISPATCHERS[dispatch.dispatcher](
      x_BSD,
      routing,
      weights,
      activation,
      dispatch,
      expert_top_k=cfg.router.top_k * experts_choose,
    )
    y_BSD = checkpoint_name(y_BSD, EXPERTS)
    if cfg.shared_gate:
      gate_BS1 = jax.nn.sigmoid(router_logits(x_BSD, self.shared_gate[...]))
      return y_BSD + gate_BS1.astype(x_BSD.dtype) * self.shared(x_BSD), dropped
    if cfg.num_shared:
      return y_BSD + self.shared(x_BSD), dropped
    return y_BSD, dropped

  def balance(
    self, routing: Routing, tokens: Tokens, whole: Mapping[str, Array] | None
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the losses of `scopes`, and what those with larger sets see of this batch.

    Losses are scalars without coefficient; what is seen is [E].
    """
    losses: dict[str, Array] = {}
    seen: dict[str, Array] = {}
    if whole is None:
      return losses, seen
    rows = tokens.mask.shape[0]
    for name, scope in self.scopes.items():
      loss = BALANCE_LOSSES[name]
      if scope.rows > rows:
        expect_whole(whole, name, scope.rows, rows)
        seen[name] = loss.seen(routing, tokens.mask, scope)
        scope = scope._replace(whole=whole[name])
      losses[name] = loss.value(routing, tokens.mask, tokens.segments, scope)
    return losses, seen
