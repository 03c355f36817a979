"""Which experts a token goes to, and with what weight.

  logits -> scores (of all experts) -> choice = scores + bias -> selection -> expert_ids
  expert_ids, scores -> weights

Everything here is float32 whatever the compute dtype: a bias step of 1e-3 is below the spacing of
bfloat16 around 0.5.

Letters: B batch, S sequence, D model, E experts, K experts per token, M groups of experts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import above_zero, at_least, check, not_finite, not_one_of, problem_if
from moejax.moe.input_checks import expect_bias, expect_logits, expect_tokens
from moejax.moe.selection import (
  SELECTIONS,
  Tokens,
  keep_second,
  limit_to_groups,
  margin,
  noisy,
  num_dropped,
  whole_rows,
  without_some,
)
from moejax.moe.token_sets import zero_padding


class Routing(NamedTuple):
  """What the router decided; it flows on to balance and dispatch."""

  logits: Array  # [B, S, E] f32  what the scores are made from, noise included
  scores: Array  # [B, S, E] f32  score_fn(logits), over all experts, before top-k
  probs: Array  # [B, S, E] f32  scores normalised over all experts: what a balance loss calls P
  expert_ids: Array  # [B, S, K] i32  the experts chosen, top-k's best first; E: unassigned
  weights: Array  # [B, S, K] f32  what their outputs are multiplied by; 0 for unassigned
  best_ids: Array  # [B, S, K] i32  the top-K of the scores alone: no bias, no groups, no selection
  # [B, S] f32  least choice taken minus best one not taken: how far from flipping; inf: none left
  margin: Array
  likely: Array  # [B, S, E] f32  P(expert is chosen | noise); zeros without noise
  router: Array  # [D, E]    f32  the router's own weights, where there are any ([0, E] else)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """How experts are scored, chosen and weighed.

  num_experts: routed experts of a layer.
  top_k: how many of them a token goes to.
  score_fn: a row of SCORE_FNS.
  num_groups: above 1 limits the choice to the experts of the `top_groups` best groups (DeepSeek-V3,
    section 2.1.2), a group being worth the sum of its `group_best` best entries.
  top_groups: groups that a token may choose from, of num_groups.
  group_best: entries of a group that are summed to say what it is worth.
  weigh: a row of WEIGHTS.
  renormalise: divides the chosen scores by their sum.
  scale: multiplies the weights last.
  selection: a row of SELECTIONS; all but 'top_k' ignore the router bias, and two are not causal.
  logit_bias: adds a learnt bias to the logits (gpt-oss).

  In training only:

  jitter: epsilon of a factor U(1 - epsilon, 1 + epsilon) on the router's input.
  noisy: learnt noise on the logits.
  expert_dropout: part of the experts that a layer may not choose in a step.
  random_second: GShard's second expert.
  """

  num_experts: int = 8
  top_k: int = 2
  score_fn: str = 'softmax'
  num_groups: int = 1
  top_groups: int = 1
  renormalise: bool = True
  scale: float = 1.0
  weigh: str = 'scores'
  group_best: int = 2
  selection: str = 'top_k'
  jitter: float = 0.0
  noisy: bool = False
  expert_dropout: float = 0.0
  random_second: bool = False
  logit_bias: bool = False

  def __post_init__(self) -> None:
    check(*not_finite(self))
    experts, groups = self.num_experts, max(1, self.num_groups)
    reachable = experts // groups * self.top_groups
    remaining = experts - num_dropped(self.expert_dropout, experts)
    check(
      *at_least(1, self, 'num_experts'),
      problem_if(
        not 1 <= self.top_k <= experts, f'top_k={self.top_k}: use 1 to num_experts={experts}'
      ),
      not_one_of('score_fn', self.score_fn, SCORE_FNS),
      not_one_of('selection', self.selection, SELECTIONS),
      not_one_of('weigh', self.weigh, WEIGHTS),
      problem_if(
        self.num_groups < 1 or experts % groups,
        f'num_groups={self.num_groups} does not divide num_experts={experts}: use a divisor of it',
      ),
      problem_if(
        not 1 <= self.top_groups <= groups,
        f'top_groups={self.top_groups}: use 1 to num_groups={self.num_groups}',
      ),
      problem_if(
        self.top_k > reachable and self.top_k <= experts,
        f'top_k={self.top_k} is more than the {reachable} experts of '
        f'top_groups={self.top_groups} groups: raise top_groups or lower top_k',
      ),
      *at_least(1, self, 'group_best', meaning='a group is worth its best expert'),
      problem_if(
        self.weigh == 'softmax' and not self.renormalise,
        "weigh='softmax' always adds up to 1: use renormalise=True",
      ),
      *above_zero(self, 'scale'),
      problem_if(not 0 <= self.jitter < 1, f'jitter={self.jitter}: use 0 (off) or more, below 1'),
      problem_if(
        self.noisy and self.top_k >= experts,
        f'noisy=True needs an expert that is not chosen: use top_k below num_experts={experts}',
      ),
      problem_if(
        self.expert_dropout and not self.top_k <= remaining < experts,
        f'expert_dropout={self.expert_dropout} leaves {remaining} of num_experts={experts}: '
        f'use 0 (off), or what leaves top_k={self.top_k} to {experts - 1}',
      ),
      problem_if(
        self.expert_dropout and self.num_groups > 1,
        f'expert_dropout={self.expert_dropout} with num_groups={self.num_groups} '
        'can empty a group: use one of them',
      ),
      problem_if(
        self.random_second and self.top_k != 2,
        f'random_second=True is for two experts per token, not top_k={self.top_k}: use top_k=2',
      ),
      *self._ignored(),
    )

  def _ignored(self) -> list[str]:
    """A problem for each switch of top-k's choice that the selection would ignore."""
    if self.selection not in SELECTIONS or SELECTIONS[self.selection].takes_bias:
      return []
    off = {'num_groups': 1, 'expert_dropout': 0.0, 'noisy': False, 'random_second': False}
    on = [name for name in off if getattr(self, name) > off[name]]
    return [
      f'{name}={getattr(self, name)} is about a choice that selection={self.selection!r} '
      f'does not make: use {name}={off[name]}'
      for name in on
    ]

  @property
  def random(self) -> bool:
    """Whether training draws random numbers."""
    return bool(self.jitter or self.noisy or self.expert_dropout or self.random_second)

  @property
  def has_margin(self) -> bool:
    """Whether a choice leaves an expert that could have been taken: else no margin is defined."""
    remaining = self.num_experts - round(self.expert_dropout * self.num_experts)
    return self.top_k < min(remaining, self.num_experts // self.num_groups * self.top_groups)


def router_logits(x: Array, w: Array) -> Array:
  """`x w` [B, S, E] in true float32.

  TPUs and GPUs would round the factors of a default-precision product to bfloat16.

  Args:
    x: [B, S, D] of any dtype.
    w: [D, E] f32.
  """
  return jnp.einsum('bsd,de->bse', x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


def router_input(
  logits: Array, bias: Array | None, cfg: RouterConfig, tokens: Tokens | None
) -> tuple[Array, Array, Tokens]:
  """Returns the arguments of `route` without its Nones, and with 0 for the logits of padding."""
  logits = jnp.asarray(logits)
  bias = jnp.zeros(cfg.num_experts) if bias is None else jnp.asarray(bias)
  if tokens is None:
    tokens = whole_rows(jnp.ones(logits.shape[:2], bool))
  expect_logits(logits, cfg.num_experts)
  expect_bias(bias, cfg.num_experts)
  expect_tokens(tokens, logits.shape[:2])
  return zero_padding(logits, tokens.mask), bias, tokens


def route(
  logits: Array,
  bias: Array | None,
  cfg: RouterConfig,
  tokens: Tokens | None = None,
  noise_std: Array | None = None,
) -> Routing:
  """Scores all experts, chooses by score plus bias, weighs by score alone.

  2408.15664, section 3; DeepSeek-V3 eq. 16.

  Args:
    logits: [B, S, E] f32.
    bias: [E] f32; None: zeros, as where there is no bias rule. No gradient passes: top-k has none,
      and weights never see it.
    tokens: which of them count, and what other selections than top-k, and all randomness, look at;
      None: all count, and nothing is random. Logits of padding are taken for 0, be they NaN.
    noise_std: [B, S, E] f32 for cfg.noisy.

  Raises:
    ValueError: an array has another shape or dtype, or hash selection is given no ids.

  Recorded expert_ids in `tokens.replayed` are used as they are, and weighed by the scores of now. A
  second expert that GShard's draw left out is not in the record: the first one is then renormalised
  alone. Ties go to the lowest expert index.
  """
  logits, bias, tokens = router_input(logits, bias, cfg, tokens)
  num_experts, likely = cfg.num_experts, jnp.zeros_like(logits)
  if cfg.noisy:
    logits, likely = noisy(logits, noise_std, tokens, cfg.top_k)
  log_scores = SCORE_FNS[cfg.score_fn](logits)
  scores = jnp.exp(log_scores)
  choice = jax.lax.stop_gradient(scores) + bias
  if cfg.num_groups > 1:
    choice = limit_to_groups(choice, cfg.num_groups, cfg.top_groups, cfg.group_best)
  if cfg.expert_dropout:
    choice = without_some(choice, tokens, cfg.expert_dropout)
  if tokens.replayed is not None:
    expert_ids = tokens.replayed
  else:
    expert_ids = SELECTIONS[cfg.selection].choose(
      jax.lax.stop_gradient(log_scores), choice, tokens, cfg.top_k
    )
  weights = weights_of(WEIGHTS[cfg.weigh](log_scores, logits), expert_ids, cfg.renormalise)
  if cfg.random_second and tokens.replayed is None:
    kept = keep_second(jax.lax.stop_gradient(weights), tokens)
    expert_ids = jnp.where(kept, expert_ids, num_experts)
    weights = jnp.where(kept, weights, 0.0)
  best_ids = jax.lax.top_k(jax.lax.stop_gradient(scores), cfg.top_k)[1]
  return Routing(
    logits=logits,
    scores=scores,
    probs=jax.nn.softmax(log_scores, axis=-1),
    expert_ids=expert_ids,
    weights=weights * cfg.scale,
    best_ids=best_ids,
    margin=margin(choice, expert_ids),
    likely=likely,
    router=jnp.zeros((0, num_experts)),
  )


def weights_of(log_weights: Array, expert_ids: Array, renormalise: bool) -> Array:
  """What the outputs of the chosen experts are multiplied by. [B, S, K] f32.

  Args:
    log_weights: [B, S, E] f32, logarithms of the weights of all experts.
    expert_ids: [B, S, K] i32; an id of E is unassigned, and weighs 0.
    renormalise: a token's weights sum to 1.
  """
  assigned = expert_ids < log_weights.shape[-1]
  log_chosen = jnp.take_along_axis(log_weights, expert_ids, axis=-1, mode='clip')
  # Not -inf: a token without any expert would have a softmax of NaN, and a gradient of NaN behind
  # the `where`.
  log_chosen = jnp.where(assigned, log_chosen, -1e30)
  weights = jax.nn.softmax(log_chosen, axis=-1) if renormalise else jnp.exp(log_chosen)
  return jnp.where(assigned, weights, 0.0)


def log_sqrt_softplus(logits: Array) -> Array:
  """log sqrt(log(1 + exp z)) (DeepSeek-V4's score), which is z / 2 where exp z is lost beside 1."""
  low = logits < -15
  return 0.5 * jnp.where(low, logits, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, logits))))


# name -> logits [B, S, E] to the logarithm of the scores. Both normalisations, over all experts for
# a loss and over the chosen ones for weights, are a softmax of it: rows sum to 1 however small the
# scores are. Dividing by a sum with a tiny epsilon lets logits near -50 shrink a balance loss below
# its balanced value, and overflows in the gradient.
SCORE_FNS: dict[str, Callable[[Array], Array]] = {
  'sigmoid': jax.nn.log_sigmoid,
  'softmax': jax.nn.log_softmax,
  'sqrt_softplus': log_sqrt_softplus,
}

# name -> (log scores, logits) to what the chosen are weighed by, as a logarithm. 'softmax' is
# softmax after top-k, over the chosen logits alone (gpt-oss); for softmax scores that is the same
# as renormalising them.
WEIGHTS: dict[str, Callable[[Array, Array], Array]] = {
  'scores': lambda log_scores, logits: log_scores,
  'softmax': lambda log_scores, logits: logits,
}
