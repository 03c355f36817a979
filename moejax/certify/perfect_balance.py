"""Lines 2 and 8: what a loss is at perfect balance, and that smaller scores do not go below it.

  even expert ids, any logits -> forced routing -> value of each loss | 1, 0 or the oracle's

Letters: B batch, S sequence, E experts, K experts per token, L layers, n losses measured.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from jax import Array

from moejax.certify.batches import B
from moejax.certify.cases import Plan, router_name
from moejax.certify.checks import Check, Worst
from moejax.certify.equations import VALUE, relative
from moejax.certify.measure import CANONICAL, Inputs, Loss, losses, route_with_noise, values
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import codebases as oracle_codebases
from moejax.certify.oracle import routing as oracle
from moejax.moe import balance, routing

ONE = (*CANONICAL, 'gshard')  # 1 at balance
NOUGHT = ('importance', 'load')  # squared variations: 0 at balance


def even_ids(cfg: routing.RouterConfig) -> np.ndarray:
  """Experts of each token, best first, such that E tokens use each expert K times. [B, E, K]."""
  place = np.arange(cfg.num_experts)[:, None] + np.arange(cfg.top_k)
  return np.broadcast_to(place % cfg.num_experts, (B, *place.shape)).astype(np.int32)


def circulant(cfg: routing.RouterConfig) -> np.ndarray:
  """Logits that choose `even_ids`, each row of E tokens the same numbers in turn. [B, E, E] f32."""
  ahead = (np.arange(cfg.num_experts) - np.arange(cfg.num_experts)[:, None]) % cfg.num_experts
  return np.broadcast_to(np.maximum(6 - 0.5 * ahead, 0), (B, *ahead.shape)).astype(np.float32)


def force_experts(
  inputs: Inputs,
  bias: Array,
  mask: Array,
  segments: Array,
  expert_ids: Array,
  likely: Array,
  cfg: routing.RouterConfig,
) -> routing.Routing:
  """A routing of the given expert_ids [B, S, K] and likely [B, S, E], weighed by its scores."""
  routed, _ = route_with_noise(inputs, bias, mask, segments, cfg)
  log_scores = routing.SCORE_FNS[cfg.score_fn](routed.logits)
  log_weights = routing.WEIGHTS[cfg.weigh](log_scores, routed.logits)
  weights = routing.weights_of(log_weights, expert_ids, cfg.renormalise)
  return routed._replace(expert_ids=expert_ids, best_ids=expert_ids, weights=weights, likely=likely)


def even_load_values(plan: Plan, cfg: routing.RouterConfig, logits: np.ndarray) -> np.ndarray:
  """All losses where tokens go to experts evenly, whatever the logits [B, E, E] say. [n]."""
  experts, mask = cfg.num_experts, np.ones((B, cfg.num_experts), bool)
  segments, no_bias = mask.astype(np.int32), np.zeros(experts, np.float32)
  inputs = Inputs(logits, np.ones_like(logits), np.eye(experts, dtype=np.float32))
  program = plan.program(force_experts, cfg)
  batch = (inputs, no_bias, mask, segments)
  routed = program(*batch, even_ids(cfg), circulant(cfg))
  return np.asarray(plan.program(values, losses(cfg))(routed, mask, segments))


def value_at_balance(loss: Loss, logits: np.ndarray) -> float:
  """What a loss is at perfect balance; NaN for a row of which that is not known."""
  if loss.name in ONE:
    return 1.0
  if loss.name == 'router_z':
    return oracle_balance.router_z(logits, np.ones(logits.shape[:2], bool))
  return 0.0 if loss.name in (*NOUGHT, 'simbal') else math.nan


def balance_line(plan: Plan) -> Iterator[Check]:
  """Checks line 2."""
  exact = {}
  for name in sorted(balance.BALANCE_LOSSES):
    why = 'relative; up to 1024 numbers added up in float32'
    exact[name] = Worst(f'{name} at perfect balance', 3 * VALUE, why)
  for cfg in plan.token_choice():
    if cfg.num_groups > 1:
      cfg = routing.RouterConfig(cfg.num_experts, cfg.top_k, cfg.score_fn)
    even = circulant(cfg)
    noise = plan.rng(3, cfg.num_experts).normal(scale=0.1, size=even.shape)
    uneven = (even + noise).astype(np.float32)
    for label, logits in (('even probabilities', even), ('uneven', uneven)):
      for loss, value in zip(losses(cfg), even_load_values(plan, cfg, logits)):
        # Squared variations look at probabilities, or at weights made of them: those are uneven.
        if label == 'uneven' and loss.name in NOUGHT:
          continue
        where = f'{loss}; {router_name(cfg)}; {label}'
        exact[loss.name].see(where, relative(value, value_at_balance(loss, logits)))
  for worst in exact.values():
    yield worst.check()
  yield from check_conversions(plan)


def check_conversions(plan: Plan) -> Iterator[Check]:
  """Checks the coefficients of other codebases: converted, they add the same to the LM loss."""
  balanced = Worst("other codebases' coefficients, at balance", 1e-12, 'relative, all in float64')
  anywhere = Worst("other codebases' coefficients, anywhere", 1e-12, 'relative, all in float64')
  rng = plan.rng(4)
  for (experts, top_k), layers in itertools.product(((8, 2), (64, 8)), (1, 3)):
    ids = even_ids(routing.RouterConfig(experts, top_k))
    ids = np.broadcast_to(ids, (layers, *ids.shape))
    logits = rng.normal(size=(layers, B, experts, experts))
    random_ids = np.argsort(-logits, axis=-1)[..., :top_k]
    probs = oracle.probabilities(logits, 'softmax')
    for name, (theirs, scope) in oracle_codebases.CODEBASES.items():
      ratio = balance.convert_coefficient(name, 1.0, top_k=top_k, num_moe_layers=layers)
      where = f'{name} E{experts} K{top_k} L{layers}'
      balanced.see(where, theirs(probs, ids) / ratio - 1)
      if scope:  # where layers are pooled there is no factor off balance
        ours = mean_over_layers(probs, random_ids, scope)
        anywhere.see(where, theirs(probs, random_ids) / (ratio * ours) - 1)
  for name in set(balance.CODEBASES) ^ set(oracle_codebases.CODEBASES):
    balanced.see(f'{name} is not in both tables', math.nan)
  yield balanced.check()
  yield anywhere.check()


def mean_over_layers(probs: np.ndarray, ids: np.ndarray, scope: str) -> float:
  """The oracle's loss of this scope where all tokens count, averaged over layers.

  probs [L, B, S, E], ids [L, B, S, K]; each row is one document.
  """
  shape = ids.shape[1:3]
  sets = oracle_balance.sets_of(scope, np.ones(shape, int))
  of_layers = []
  for p, chosen in zip(probs, ids):
    of_sets = oracle_balance.probability_losses(p, chosen, np.ones(shape, bool), sets)
    of_layers.append(oracle_balance.mean_over_sets(of_sets))
  return np.mean(of_layers)


def shrunk_logits(noise: np.ndarray) -> dict[str, np.ndarray]:
  """Logits whose scores are smaller or larger than those of the first, by what was done to them."""
  return {
    'as they are': noise,
    'less 50': noise - 50,
    'less 1e4': noise - 1e4,  # every sigmoid underflows to 0
    'plus 50': noise + 50,
    'times 1e-3': noise * 1e-3,
    'times 30': noise * 30,
  }


def shrink_line(plan: Plan) -> Iterator[Check]:
  """Checks line 8: a loss that falls with the scores would train them to vanish."""
  exact, below = {}, {}
  for name in ONE:
    why = 'by how much it is not 1; sums of float32'
    exact[name] = Worst(f'{name} of an even load', VALUE, why)
  for name in NOUGHT:
    below[name] = Worst(f'{name} below its balance', 0, 'a square is never below 0')
  for cfg in plan.token_choice():
    cfg = routing.RouterConfig(cfg.num_experts, cfg.top_k, cfg.score_fn)
    if cfg.num_experts > 64:
      continue
    noise = plan.rng(6, cfg.num_experts).normal(size=circulant(cfg).shape)
    for label, logits in shrunk_logits(noise).items():
      of_losses = even_load_values(plan, cfg, logits.astype(np.float32))
      for loss, value in zip(losses(cfg), of_losses):
        where = f'{loss}; {router_name(cfg)}; logits {label}'
        if loss.name in ONE:
          exact[loss.name].see(where, value - 1)
        elif loss.name in NOUGHT:
          below[loss.name].see(where, min(value, 0) if math.isfinite(value) else math.nan)
  for worst in (*exact.values(), *below.values()):
    yield worst.check()
