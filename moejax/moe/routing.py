"""Which experts a token goes to, and with what weight.

  logits -> scores (over all experts) -> choice = scores + bias -> top-k -> expert_ids -> weights, from the scores

Everything here is float32 whatever the compute dtype: a bias step of 1e-3 is below the spacing of bfloat16 around 0.5.

Letters: B batch, S sequence, D model, E experts, K experts per token, M groups of experts.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from moejax.config import check


class Routing(NamedTuple):
  """What the router decided; it flows on to balance and dispatch."""

  logits: Array      # [B, S, E] f32  what the router computed
  scores: Array      # [B, S, E] f32  score_fn(logits), over all experts, before top-k
  probs: Array       # [B, S, E] f32  scores normalised over all experts: what a balance loss calls P
  expert_ids: Array  # [B, S, K] i32  the experts chosen, best first
  weights: Array     # [B, S, K] f32  what their outputs are multiplied by


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """How experts are scored and chosen.

  `num_groups` > 1 limits the choice to the experts of the `top_groups` best groups (DeepSeek-V3, section 2.1.2).
  `renormalise` divides the chosen weights by their sum; `scale` multiplies them afterwards.
  """

  num_experts: int = 8
  top_k: int = 2
  score_fn: str = 'softmax'
  num_groups: int = 1
  top_groups: int = 1
  renormalise: bool = True
  scale: float = 1.0

  def __post_init__(self) -> None:
    experts, groups = self.num_experts, max(1, self.num_groups)
    reachable = experts // groups * self.top_groups
    check(
      f'num_experts={experts}: use 1 or more' if experts < 1 else '',
      f'top_k={self.top_k}: use 1 to num_experts={experts}' if not 1 <= self.top_k <= experts else '',
      f'score_fn={self.score_fn!r} is not one of {sorted(SCORE_FNS)}' if self.score_fn not in SCORE_FNS else '',
      f'num_groups={self.num_groups} does not divide num_experts={experts}: use a divisor of it'
      if self.num_groups < 1 or experts % groups else '',
      f'top_groups={self.top_groups}: use 1 to num_groups={self.num_groups}'
      if not 1 <= self.top_groups <= groups else '',
      f'top_k={self.top_k} is more than the {reachable} experts of top_groups={self.top_groups} groups: '
      'raise top_groups or lower top_k' if self.top_k > reachable and self.top_k <= experts else '',
      f'scale={self.scale}: use a number above 0' if self.scale <= 0 else '',
    )


def router_logits(x: Array, w: Array) -> Array:
  """`x w` in true float32: TPUs and GPUs would round the factors of a default-precision product to bfloat16.

  Args:
    x: [B, S, D] of any dtype.
    w: [D, E] f32.
  """
  return jnp.einsum('bsd,de->bse', x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


def limit_to_groups(choice: Array, num_groups: int, top_groups: int) -> Array:
  """`choice` with -inf outside the best `top_groups` groups of neighbouring experts. [B, S, E] -> [B, S, E].

  A group is worth the sum of its two best entries: what DeepSeek-V3's code does; its text says the best K/M, which
  is the same for K/M = 2. Outside it is -inf, not 0: with a negative bias 0 would win.
  """
  grouped = choice.reshape(*choice.shape[:-1], num_groups, -1)                       # [B, S, M, E/M]
  worth = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)               # [B, S, M]
  kept = jax.lax.top_k(worth, top_groups)[1]                                         # [B, S, top_groups]
  inside = jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_).any(-2)                 # [B, S, M]
  return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(choice.shape)


def route(logits: Array, bias: Array, cfg: RouterConfig) -> Routing:
  """Scores all experts, chooses by score plus bias, weighs by score alone (2408.15664, section 3; DeepSeek-V3 eq. 16).

  Args:
    logits: [B, S, E] f32.
    bias: [E] f32, zeros when there is no bias rule. No gradient passes: top-k has none, and weights never see it.

  Ties go to the lowest expert index.
  """
  log_scores = SCORE_FNS[cfg.score_fn](logits)
  scores = jnp.exp(log_scores)
  choice = jax.lax.stop_gradient(scores) + bias
  if cfg.num_groups > 1:
    choice = limit_to_groups(choice, cfg.num_groups, cfg.top_groups)
  expert_ids = jax.lax.top_k(choice, cfg.top_k)[1]
  chosen = jnp.take_along_axis(log_scores, expert_ids, axis=-1)
  weights = jax.nn.softmax(chosen, axis=-1) if cfg.renormalise else jnp.exp(chosen)
  return Routing(logits, scores, jax.nn.softmax(log_scores, axis=-1), expert_ids, weights * cfg.scale)


# name -> logits [B, S, E] to the logarithm of the scores. Both normalisations, over all experts for a loss and over the
# chosen ones for weights, are a softmax of it: rows sum to 1 however small the scores are. Dividing by a sum with a
# tiny epsilon lets logits near -50 shrink a balance loss below its balanced value, and overflows in the gradient.
SCORE_FNS: dict[str, Callable[[Array], Array]] = {
  'sigmoid': jax.nn.log_sigmoid,
  'softmax': jax.nn.log_softmax,
}
