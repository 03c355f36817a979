"""Line 1: every loss, every router and every bias rule is its equation, in float64 NumPy.

  batch -> moejax in float32 | the oracle in float64 -> values side by side; gradient | finite differences of the oracle

Letters: B batch, S sequence, E experts, K experts per token.
"""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from moejax.certify.bias_rules import of_rules
from moejax.certify.cases import EP_GROUPS, MICRO_BATCHES, Case, Plan, make_cases, router_name
from moejax.certify.measure import Inputs, Loss, Measured, inputs_of, losses, measured, tokens_of
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import routing as oracle
from moejax.certify.oracle import selection as oracle_selection
from moejax.certify.report import Check, Worst
from moejax.moe import balance, routing

VALUE, GRADIENT = 1e-6, 1e-5
QUICK_CASES = ('padded', 'holes', 'extreme', 'low', 'nothing')
LARGE_CASES = (
  'packed',
  'holes',
  'extreme',
)  # of 64 experts and more, where the oracle's loops take long
OTHER_CASES = ('padded', 'packed', 'holes')  # of routers for which ties and 1e4 are no question
STEP = 1e-5  # of finite differences: errors of 1e-10 both by cutting and by rounding


class Point:
  """Inputs at which the oracle is asked for several losses: what they share is computed once."""

  def __init__(
    self, inputs: Inputs, draws: np.ndarray, cfg: routing.RouterConfig, bias: np.ndarray
  ) -> None:
    self.clean, self.std, self.router = (np.asarray(a, np.float64) for a in inputs)
    self.logits = self.clean + draws * self.std if cfg.noisy else self.clean
    self.probabilities = functools.lru_cache(
      lambda score_fn: oracle.probabilities(self.logits, score_fn)
    )
    self.cfg, self.bias = cfg, bias

  def weights(self, expert_ids: np.ndarray) -> np.ndarray:
    """Of the experts that were chosen. [B, S, K]."""
    cfg = self.cfg
    logs = oracle_selection.log_scores(self.logits, cfg.score_fn)
    kept = expert_ids < cfg.num_experts
    if cfg.random_second:  # both are weighed before the second is dropped
      best = oracle_selection.top_k_experts(
        logs, np.exp(logs) + self.bias, kept, expert_ids, cfg.top_k
      )
      expert_ids = np.where(kept, expert_ids, best)
    logs = self.logits if cfg.weigh == 'softmax' else logs
    return oracle_selection.weigh_chosen(logs, expert_ids, cfg.renormalise, cfg.scale) * kept


def equation(
  loss: Loss, cfg: routing.RouterConfig, case: Case, found: Measured
) -> Callable[[Point], float]:
  """The oracle's loss as a function of the inputs; f has no gradient: the choice stands."""
  mask, ids = case.mask, found.routing.expert_ids
  others: dict[str, Callable[[Point], float]] = {
    'router_z': lambda at: oracle_balance.router_z(at.logits, mask),
    'importance': lambda at: oracle_balance.importance(at.weights(ids), ids, mask, cfg.num_experts),
    'load': lambda at: oracle_balance.smooth_load(
      oracle_selection.likely(at.clean, at.logits, at.std, cfg.top_k), mask
    ),
    'simbal': lambda at: oracle_balance.simbal(at.router),
  }
  if loss.name in others:
    return others[loss.name]
  if loss.name not in oracle_balance.SETS:
    return lambda at: math.nan  # a row without its equation is not certified
  assignment = 'first' if loss.name == 'gshard' else loss.assignment
  if assignment == 'unbiased':  # K of them, also where a router has room for E
    chosen = oracle_balance.assignment_of(
      found.routing.logits, ids[..., : cfg.top_k], cfg.score_fn, assignment
    )
  else:
    chosen = oracle_balance.assignment_of(found.routing.logits, ids, cfg.score_fn, assignment)
  sets = oracle_balance.sets_of(
    loss.name, case.segments, micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS
  )
  return lambda at: oracle_balance.mean_over_sets(
    oracle_balance.probability_losses(
      at.probabilities(loss.probability or cfg.score_fn), chosen, mask, sets, loss.partition
    )
  )


def relative(found: float, wanted: float) -> float:
  """|found - wanted| as a part of what is wanted, or of 1 where that is less: of balance, or of collapse less 1."""
  return abs(found - wanted) / max(abs(wanted), 1.0)


def moved(inputs: Inputs, direction: Inputs, by: float) -> Inputs:
  """Inputs, in float64, a step along a direction."""
  return Inputs(*(np.asarray(a, np.float64) + by * d for a, d in zip(inputs, direction)))


def off_slope(gradient: Inputs, size: float, direction: Inputs, slope: float) -> float:
  """How far the gradient's slope along a direction is off, as a part of the gradient's norm.

  Of the norm before it cancels out, if that is more: an even f has a gradient of 0, as a difference of equals.
  """
  pairs = [(g.astype(np.float64), d) for g, d in zip(gradient, direction)]
  norm = math.sqrt(sum(float((g**2).sum()) for g, _ in pairs))
  return abs(sum(float((g * d).sum()) for g, d in pairs) - slope) / max(norm, size, 1e-5)


class LossChecks:
  """The worst of every loss: its value, its gradient along a direction, and what must have no gradient."""

  def __init__(self) -> None:
    self.values = {
      name: Worst(f'value of {name}', VALUE, 'relative; sums of float32')
      for name in balance.BALANCE_LOSSES
    }
    self.slopes = {
      name: Worst(
        f'gradient of {name}', GRADIENT, 'of its norm; float32 against differences of float64'
      )
      for name in balance.BALANCE_LOSSES
    }
    self.others = Worst('gradient of tokens that do not count', 0, 'it is exactly none')

  def compare(self, plan: Plan, cfg: routing.RouterConfig, label: str, case: Case) -> None:
    """All losses of one batch."""
    found, inputs, rng = (
      measured(plan, cfg, case),
      inputs_of(plan, case),
      plan.rng(1, cfg.num_experts),
    )
    direction = Inputs(*(rng.normal(size=a.shape) for a in inputs))
    at, above, below = (
      Point(moved(inputs, direction, by), found.draws, cfg, case.bias) for by in (0, STEP, -STEP)
    )
    for i, loss in enumerate(losses(cfg)):
      if loss.name == 'load' and not cfg.noisy:  # there is no load that noise may give
        continue
      where, f = f'{loss}; {router_name(cfg)}; {label}', equation(loss, cfg, case, found)
      gradient = Inputs(*(g[i] for g in found.gradients))
      self.values[loss.name].see(where, relative(found.values[i], f(at)))
      slope = (f(above) - f(below)) / (2 * STEP)
      self.slopes[loss.name].see(where, off_slope(gradient, found.sizes[i], direction, slope))
      self.others.see(where, np.abs(gradient.logits[~case.mask]).max(initial=0))

  def checks(self) -> Iterator[Check]:
    """Of each loss, values first."""
    for name in self.values:
      yield self.values[name].check()
      yield self.slopes[name].check()
    yield self.others.check()


def of_losses(plan: Plan) -> Iterator[Check]:
  """Losses: scope, assignment, partition and probability, on whole, padded, packed and odd batches."""
  checks = LossChecks()
  for cfg in plan.token_choice():
    for label, case in make_cases(plan, cfg.num_experts).items():
      if label in QUICK_CASES if plan.quick else cfg.num_experts < 64 or label in LARGE_CASES:
        checks.compare(plan, cfg, label, case)
  for cfg in plan.other_routers():
    for label in OTHER_CASES:
      checks.compare(plan, cfg, label, make_cases(plan, cfg.num_experts)[label])
  yield from checks.checks()


def every_entry(plan: Plan) -> Iterator[Check]:
  """The smallest router: not a slope along one direction, but every entry of the gradient of the first row."""
  worst = Worst(
    'every entry of the gradients', GRADIENT, 'of the largest entry; differences in float64'
  )
  for score_fn in sorted(routing.SCORE_FNS):
    cfg, case = routing.RouterConfig(4, 2, score_fn, num_groups=2), make_cases(plan, 4)['holes']
    found, inputs = measured(plan, cfg, case), inputs_of(plan, case)

    def at(
      row: np.ndarray,
      inputs: Inputs = inputs,
      found: Measured = found,
      cfg: routing.RouterConfig = cfg,
      case: Case = case,
    ) -> Point:
      logits = np.concatenate([row[None], case.logits[1:]])
      return Point(inputs._replace(logits=logits), found.draws, cfg, case.bias)

    for i, loss in enumerate(losses(cfg)):
      if loss.name not in ('load', 'simbal'):  # which have no gradient to logits here
        f = equation(loss, cfg, case, found)
        wanted = oracle.finite_difference(lambda row, f=f, at=at: f(at(row)), case.logits[0])
        off = np.abs(found.gradients.logits[i][0] - wanted).max() / np.abs(wanted).max()
        worst.see(f'{loss}; {router_name(cfg)}', off)
  yield worst.check()


def chosen_experts(plan: Plan) -> Iterator[Check]:
  """Who is chosen, and the weights of those, of every selection."""
  choice = Worst(
    'experts chosen by top_k', VALUE, 'by how much a chosen score is less than the best, in float64'
  )
  weights = Worst('weights', VALUE, 'absolute, of weights that sum to 1 or scale')
  ties = Worst('ties go to the lowest expert', 0, 'whole numbers')
  for cfg in plan.token_choice():
    for label, case in make_cases(plan, cfg.num_experts).items():
      if cfg.num_experts > 8 and label != 'packed':
        continue
      found, where = measured(plan, cfg, case).routing, f'{router_name(cfg)}; {label}'
      biased = oracle.scores(case.logits, cfg.score_fn) + case.bias
      limited = np.apply_along_axis(
        oracle_selection.limited_to_groups,
        -1,
        biased,
        cfg.num_groups,
        cfg.top_groups,
        cfg.group_best,
      )
      wanted = oracle_selection.top_k_experts(biased, limited, case.mask, case.segments, cfg.top_k)
      lost = np.take_along_axis(biased, wanted, -1) - np.take_along_axis(
        biased, found.expert_ids, -1
      )
      choice.see(where, np.abs(lost).max())
      theirs = Point(inputs_of(plan, case), np.zeros(()), cfg, case.bias).weights(found.expert_ids)
      weights.see(where, np.abs(found.weights - theirs).max())
      if label in ('ties', 'equal'):
        ties.see(where, (found.expert_ids != wanted).sum())
  yield choice.check()
  yield ties.check()
  yield from other_choices(plan, weights)
  yield weights.check()


def other_choices(plan: Plan, weights: Worst) -> Iterator[Check]:
  """Selections that are not the best scores: exactly the oracle's experts."""
  exact = {
    cfg.selection: Worst(f'experts chosen by {cfg.selection}', 0, 'copies that go elsewhere')
    for cfg in plan.other_routers()
    if cfg.selection != 'top_k'
  }
  for cfg in plan.other_routers():
    for label in OTHER_CASES:
      case = make_cases(plan, cfg.num_experts)[label]
      found, where = measured(plan, cfg, case), f'{router_name(cfg)}; {label}'
      at = Point(inputs_of(plan, case), found.draws, cfg, case.bias)
      ids = found.routing.expert_ids
      weights.see(where, np.abs(found.routing.weights - at.weights(ids))[case.mask].max())
      if cfg.selection in exact:
        logs, token_ids = (
          oracle_selection.log_scores(at.logits, cfg.score_fn),
          tokens_of(case.mask, case.segments).ids,
        )
        wanted = oracle_selection.SELECTIONS[cfg.selection](
          logs, np.exp(logs) + case.bias, case.mask, np.asarray(token_ids), cfg.top_k
        )
        exact[cfg.selection].see(where, (ids != wanted)[case.mask].sum())
  for worst in exact.values():
    yield worst.check()


def oracle_line(plan: Plan) -> Iterator[Check]:
  """Line 1."""
  yield from of_losses(plan)
  if not plan.quick:
    yield from every_entry(plan)
  yield from chosen_experts(plan)
  yield from of_rules(plan)
