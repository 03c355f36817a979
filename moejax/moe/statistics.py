"""What a layer's routing looked like: sums over tokens that count, and statistics made of them.

  routing, mask -> observe -> Stats, sums -> add over micro-batches -> token_statistics
  -> over_layers: mean and worst

Sums are added and divided once, so a statistic does not depend on how a batch is cut; no gradient
passes. STATISTICS says of each which layer is the worst. All but `observe` also take NumPy arrays,
and then compile nothing.

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, T tokens that count.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.routing import Routing
from moejax.moe.token_sets import chosen_mask, exact_mean, masked_ids, zero_padding

# Below it a choice may be another one on another mesh: sums that differ in their order differ by
# about this much.
NEAR_TIE = 1e-3
EXACT = 2**24  # float32 counts up to it, one by one


class Stats(NamedTuple):
  """Sums over one layer's tokens that count: counts i32, all others f32.

  s are scores, M the experts chosen, M° the top-K of s alone.
  """

  tokens: Array  # scalar, T
  copies: Array  # scalar, sum of M: T * K where every token takes K experts
  pairs: Array  # [E, E], tokens that went to both experts; on the diagonal the load
  probs: Array  # [E], p: scores normalised over all experts
  entropy: Array  # scalar, -sum_e p_e ln p_e
  squares: Array  # scalar, sum_e z_e^2 of the logits z
  peak: Array  # scalar, max |z| over tokens and experts: `add` takes the larger
  logsumexp: Array  # scalar, ln sum_e exp z_e
  compared: Array  # scalar, tokens that have a margin: taken experts, and others left to take
  margin: Array  # scalar, the least choice taken less the best one left, of tokens that have one
  near_ties: Array  # scalar, tokens with a margin nearer than NEAR_TIE to 0
  # scalar, copies in M that are not in M°: the bias, or a limit to groups, sent them elsewhere
  overrides: Array
  kept: Array  # scalar, sum_e s_e M_e
  best: Array  # scalar, sum_e s_e M°_e


def pair_counts(chosen_BSE: Array) -> Array:
  """Returns how many tokens went to both of two experts. [B, S, E] of 0 and 1 -> [E, E] i32.

  A product of float32, since devices have no fast one of int32, of so few rows at a time that no
  count in it can pass 2^24: of all rows, but for the largest batches.
  """
  rows, length, experts = chosen_BSE.shape
  at_once = max(1, EXACT // length)
  total = jnp.zeros((experts, experts), jnp.int32)
  for first in range(0, rows, at_once):
    part_TE = chosen_BSE[first : first + at_once].reshape(-1, experts).astype(jnp.float32)
    total += (part_TE.T @ part_TE).astype(jnp.int32)
  return total


def observe(routing: Routing, unbiased_ids: Array, mask: Array) -> Stats:
  """Returns the sums of one layer over one micro-batch.

  Everything is O(T K (E + K)) but `pairs`, one product of 2 T E^2 FLOPs, of zeros and ones: exact
  at any precision. Training experts of width F takes 18 K D F a token, so `pairs` is
  E^2 / (9 K D F) of it: 0.1% for E=64, K=8, D=F=256, and for E=256 below 1% from D=F=302 on.

  Args:
    routing: of all tokens; an id of E is unassigned.
    unbiased_ids: [B, S, K] i32, M°.
    mask: [B, S] bool, the tokens that count. What the others hold goes nowhere, be it NaN.
  """
  routing = jax.lax.stop_gradient(routing)
  experts = routing.logits.shape[-1]
  # By `where`, never by a product with the mask: 0 * NaN is NaN.
  ids_BSK = masked_ids(routing.expert_ids, mask, experts)
  chosen_BSE = chosen_mask(ids_BSK, experts)  # M
  z_BSE = zero_padding(routing.logits, mask)
  p_BSE = zero_padding(routing.probs, mask)
  has_margin_BS = ~jnp.isinf(routing.margin)
  unbiased_BSK = (ids_BSK[..., None] == unbiased_ids[..., None, :]).any(-1)
  elsewhere_BSK = ~unbiased_BSK & (ids_BSK < experts)

  def total(values_BS: Array) -> Array:
    return zero_padding(values_BS, mask).astype(jnp.float32).sum()

  def count(values_BS: Array) -> Array:
    return zero_padding(values_BS, mask).sum(dtype=jnp.int32)

  def total_score(chosen_BSK: Array) -> Array:
    # An unassigned id is out of range, and fills in a score of 0.
    scores_BSK = jnp.take_along_axis(routing.scores, chosen_BSK, -1, mode='fill', fill_value=0)
    return total(scores_BSK.sum(-1))

  return Stats(
    tokens=count(mask),
    copies=count((ids_BSK < experts).sum(-1)),
    pairs=pair_counts(chosen_BSE),
    probs=p_BSE.sum((0, 1)),
    entropy=-(p_BSE * jnp.log(jnp.where(p_BSE > 0, p_BSE, 1))).sum(),
    squares=jnp.square(z_BSE).sum(),
    peak=jnp.abs(z_BSE).max(initial=0),
    logsumexp=total(jax.nn.logsumexp(z_BSE, axis=-1)),
    compared=count(has_margin_BS),
    margin=total(jnp.where(has_margin_BS, routing.margin, 0)),
    near_ties=count(jnp.abs(routing.margin) < NEAR_TIE),
    overrides=elsewhere_BSK.sum(dtype=jnp.int32),
    kept=total_score(ids_BSK),
    best=total_score(unbiased_ids),
  )


def add(a: Stats, b: Stats) -> Stats:
  """Returns the sums of two micro-batches, or batches, together. They may be stacked: [L, ...]."""
  sums = Stats(*(x + y for x, y in zip(a, b, strict=True)))
  return sums._replace(peak=a.peak.__array_namespace__().maximum(a.peak, b.peak))


def token_statistics(stats: Stats, has_margin: bool = True) -> dict[str, Array]:
  """Returns what the router thinks, and what balance costs it: name -> [L], of Stats [L, ...].

  router_entropy: mean over tokens of H(p) = -sum_e p_e ln p_e, nats; ln E where it prefers no
    expert.
  mutual_information: I(expert; token) = H(mean p) - mean H(p), nats; 0 where all tokens get the
    same p.
  logit_rms, logit_max: sqrt(mean z^2) and max |z|.  logsumexp: its mean, what a z-loss pulls to 0.
  margin: mean of the least choice taken less the best one left, over tokens that have both; below 0
    where the choice is not by score.
  near_ties: share of these tokens with a margin nearer than NEAR_TIE to 0.
  override_rate: share of copies in M and not in M°.
  price_of_balance: 1 - sum s M / sum s M°, the score given up; 0 where nothing is overridden.
  coactivation: sum_e max_e' pairs_ee' / sum_e c_e: share of copies whose token also went to the
    most frequent partner of their expert. About (K-1)/(E-1) without a preference, 1 where experts
    come in fixed company. This one is ours.
  Without a token all are 0.

  Args:
    stats: sums, stacked over layers.
    has_margin: `RouterConfig.has_margin`. False: no token ever has a margin, and there is neither
      `margin` nor `near_ties`.
  """
  xp = stats.tokens.__array_namespace__()  # jax.numpy or NumPy, whichever made the sums
  experts = stats.probs.shape[-1]

  def ratio(part: Array, whole: Array) -> Array:
    return xp.where(whole > 0, part / xp.where(whole > 0, whole, 1), 0)

  mean_LE = ratio(stats.probs, stats.tokens[:, None])
  entropy = ratio(stats.entropy, stats.tokens)
  entropy_of_mean = -(mean_LE * xp.log(xp.where(mean_LE > 0, mean_LE, 1))).sum(axis=-1)
  # The diagonal is an expert with itself, its load.
  others = 1 - xp.eye(experts, dtype=stats.pairs.dtype)
  partner_LE = (stats.pairs * others).max(axis=-1)
  margins = {
    'margin': ratio(stats.margin, stats.compared),
    'near_ties': ratio(stats.near_ties, stats.compared),
  }
  return (margins if has_margin else {}) | {
    'router_entropy': entropy,
    'mutual_information': entropy_of_mean - entropy,
    'logit_rms': xp.sqrt(ratio(stats.squares, stats.tokens * float(experts))),
    'logit_max': stats.peak,
    'logsumexp': ratio(stats.logsumexp, stats.tokens),
    'override_rate': ratio(stats.overrides, stats.copies),
    'price_of_balance': ratio(stats.best - stats.kept, stats.best),
    'coactivation': ratio(partner_LE.sum(axis=-1), stats.copies),
  }


def layer_statistics(load: Array, top_k: int) -> dict[str, Array]:
  """Returns how even each layer's load c [L, E] (counts) is: name -> [L].

  max_vio: max_e c_e / mean(c) - 1 (arXiv 2408.15664 eq. 4). expert_usage: share of experts with a
    token.
  dead_experts: how many have below a tenth of the mean. load_entropy: of the shares c / sum(c),
    over ln E.
  balance_score: 1 - std(c) / mean(c). noise_floor: sqrt(2 ln E (1 - K/E) / mean(c)), about the
    max_vio of choices without a preference: the largest of E Gaussians.
  std_of_share: of c / sum(c), so (1 - balance_score) / E. openPangu's measure, and it cannot train:
    it is made of counts, which stay when logits change a little, so its gradient is 0. Losses
    multiply counts by probabilities. A layer without a token scores 0 in all but dead_experts:
    never NaN.
  """
  xp, experts = load.__array_namespace__(), load.shape[-1]
  exact = exact_mean(load)
  load, whole = 1.0 * load, 1.0 * exact.whole  # float32, or NumPy's float64
  # Of an even load the very number that all counts become: their ratio is then exactly 1.
  mean = xp.where(exact.rest == 0, whole, (experts * whole + exact.rest) / experts)
  relative = load / xp.where(mean > 0, mean, 1)[:, None]  # 1 is balance
  share = relative / experts
  entropy = -(share * xp.log(xp.where(share > 0, share, 1))).sum(axis=-1)
  if experts > 1:
    load_entropy = entropy / math.log(experts)
  else:  # ln 1 = 0: one expert is even with itself
    load_entropy = xp.where(mean > 0, 1.0, 0.0)
  floor = math.sqrt(2 * math.log(experts) * (1 - top_k / experts))
  return {
    'max_vio': xp.maximum(relative.max(axis=-1) - 1, 0),
    'expert_usage': (load > 0).mean(axis=-1),
    'dead_experts': (relative < 0.1).sum(axis=-1),
    'load_entropy': load_entropy,
    'balance_score': xp.where(mean > 0, 1 - relative.std(axis=-1), 0.0),
    'std_of_share': share.std(axis=-1),
    'noise_floor': floor * xp.where(mean > 0, mean, math.inf) ** -0.5,
  }


def bias_statistics(bias: Array) -> dict[str, Array]:
  """Returns statistics over experts of each layer's selection bias [L, E]: name -> [L].

  bias_mean and bias_std, and bias_max = max |b|.
  """
  return {
    'bias_mean': bias.mean(axis=-1),
    'bias_std': bias.std(axis=-1),
    'bias_max': abs(bias).max(axis=-1),
  }


def over_layers(layers: Mapping[str, Array]) -> dict[str, Array]:
  """Returns scalars of name -> [L]: the mean over layers as NAME, the worst layer as NAME_worst."""
  worst = {f'{name}_worst': WORST[STATISTICS[name]](values) for name, values in layers.items()}
  return {name: values.mean() for name, values in layers.items()} | worst


# Which layer is the worst -> its value, of the layers' [L].
WORST: dict[str, Callable[[Array], Array]] = {
  'farthest': lambda values: values[abs(values).argmax()],  # from 0, on either side
  'largest': lambda values: values.max(),
  'smallest': lambda values: values.min(),
}

# Name of a statistic -> a row of WORST.
STATISTICS: dict[str, str] = {
  'balance_score': 'smallest',
  'bias_max': 'largest',
  'bias_mean': 'farthest',
  'bias_std': 'largest',
  'churn': 'largest',
  'coactivation': 'largest',
  'dead_experts': 'largest',
  'dropped': 'largest',
  'expert_usage': 'smallest',
  'load_entropy': 'smallest',
  'logit_max': 'largest',
  'logit_rms': 'largest',
  'logsumexp': 'farthest',
  'margin': 'smallest',
  'max_vio': 'largest',
  'mutual_information': 'smallest',
  'near_ties': 'largest',
  'noise_floor': 'largest',
  'override_rate': 'largest',
  'price_of_balance': 'largest',
  'router_entropy': 'smallest',
  'std_of_share': 'largest',
}
