"""Line 1: every loss, every router and every bias rule is its equation, in float64 NumPy.

  batch -> moejax in float32 | the oracle in float64 -> values side by side
        -> gradients | finite differences of the oracle

Letters: B batch, S sequence, E experts, K experts per token, n losses measured.
"""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from moejax.certify.batches import Case
from moejax.certify.bias_rules import check_rules
from moejax.certify.cases import EP_GROUPS, MICRO_BATCHES, Plan, make_cases, router_name
from moejax.certify.checks import Check, Worst
from moejax.certify.measure import Inputs, Loss, Measured, inputs_of, losses, measure, tokens_of
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import routing as oracle
from moejax.certify.oracle import selection as oracle_selection
from moejax.moe import balance, routing

VALUE, GRADIENT = 1e-6, 1e-5  # tolerances
LOSS = 2e-6  # of a loss's value, which is off by 0.6e-6 at most over 20 seeds
QUICK_CASES = ('padded', 'holes', 'extreme', 'low', 'nothing')
# Of 64 experts and more, where the oracle's loops take long.
LARGE_CASES = ('packed', 'holes', 'extreme')
# Of routers for which ties and logits of 1e4 are no question.
OTHER_CASES = ('padded', 'packed', 'holes')
# A gradient below this part of what cancels in it is a difference of float32 numbers that are
# equal, and is compared as that part: an even f has a gradient of 0.
CANCELS = 1e-2
STEP = 1e-5  # of finite differences: errors of 1e-10 both by cutting and by rounding


class Point:
  """Inputs at which the oracle is asked for several losses: what they share is computed once."""

  def __init__(
    self, inputs: Inputs, draws: np.ndarray, cfg: routing.RouterConfig, bias: np.ndarray
  ) -> None:
    self.inputs, self.draws, self.cfg, self.bias = inputs, draws, cfg, bias
    self.clean, self.std, self.router = (np.asarray(a, np.float64) for a in inputs)
    self.logits = self.clean + draws * self.std if cfg.noisy else self.clean
    self.probabilities = functools.lru_cache(
      lambda score_fn: oracle.probabilities(self.logits, score_fn)
    )

  def with_logits(self, logits: np.ndarray) -> 'Point':
    """The same point but for the logits, before noise [B, S, E]."""
    return Point(self.inputs._replace(logits=logits), self.draws, self.cfg, self.bias)

  def weights(self, expert_ids: np.ndarray) -> np.ndarray:
    """The weights of the experts that were chosen, 0 where unassigned. [B, S, K] -> [B, S, K]."""
    cfg = self.cfg
    logs = oracle_selection.log_scores(self.logits, cfg.score_fn)
    somebody = expert_ids < cfg.num_experts
    if cfg.random_second:
      # Both are weighed before the second is dropped: it is in the sum that divides the first.
      best = oracle_selection.top_k_experts(
        logs, np.exp(logs) + self.bias, somebody, expert_ids, cfg.top_k
      )
      expert_ids = np.where(somebody, expert_ids, best)
    log_weights = self.logits if cfg.weigh == 'softmax' else logs
    weights = oracle_selection.weigh_chosen(log_weights, expert_ids, cfg.renormalise, cfg.scale)
    return weights * somebody


def equation(
  loss: Loss, cfg: routing.RouterConfig, case: Case, measured: Measured
) -> Callable[[Point], float]:
  """The oracle's loss as a function of the inputs; f has no gradient: the choice stands."""
  mask, ids = case.mask, measured.routing.expert_ids
  others: dict[str, Callable[[Point], float]] = {
    'router_z': lambda point: oracle_balance.router_z(point.logits, mask),
    'importance': lambda point: oracle_balance.importance(
      point.weights(ids), ids, mask, cfg.num_experts
    ),
    'load': lambda point: oracle_balance.smooth_load(
      oracle_selection.likely(point.clean, point.logits, point.std, cfg.top_k), mask
    ),
    'simbal': lambda point: oracle_balance.simbal(point.router),
  }
  if loss.name in others:
    return others[loss.name]
  if loss.name not in oracle_balance.SETS:
    return lambda point: math.nan  # a row without its equation is not certified
  assignment = 'first' if loss.name == 'gshard' else loss.assignment
  # Unbiased: K of them, also where a router has room for E.
  used = ids[..., : cfg.top_k] if assignment == 'unbiased' else ids
  logits = measured.routing.logits
  chosen = oracle_balance.assignment_of(logits, used, cfg.score_fn, assignment)
  sets = oracle_balance.sets_of(
    loss.name, case.segments, micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS
  )

  def mean_loss(point: Point) -> float:
    p = point.probabilities(loss.probability or cfg.score_fn)
    of_sets = oracle_balance.probability_losses(p, chosen, mask, sets, loss.partition)
    return oracle_balance.mean_over_sets(of_sets)

  return mean_loss


def relative(value: float, wanted: float) -> float:
  """|value - wanted| as a part of |wanted|, or of 1 where that is less.

  Losses of this size are 1 at balance; squared variations, and collapse less 1, may be 0.
  """
  return abs(value - wanted) / max(abs(wanted), 1.0)


def shift(inputs: Inputs, direction: Inputs, by: float) -> Inputs:
  """Inputs, in float64, a step along a direction."""
  return Inputs(*(np.asarray(a, np.float64) + by * d for a, d in zip(inputs, direction)))


def slope_error(gradient: Inputs, size: float, direction: Inputs, slope: float) -> float:
  """How far the gradient's slope along a direction is off, as a part of the gradient's norm.

  Of the norm before it cancels out, `size`, if that is more: an even f has a gradient of 0, as a
  difference of equals.
  """
  squares, own_slope = 0, 0
  for g, d in zip(gradient, direction):
    g = g.astype(np.float64)
    squares += float((g**2).sum())
    own_slope += float((g * d).sum())
  return abs(own_slope - slope) / max(math.sqrt(squares), size, 1e-5)


class LossChecks:
  """The worst of every loss: its value, its slope along a direction, and what has no gradient."""

  def __init__(self) -> None:
    self.values, self.slopes = {}, {}
    why = 'of its norm; float32 against differences of float64'
    for name in balance.BALANCE_LOSSES:
      self.values[name] = Worst(f'value of {name}', LOSS, 'relative; sums of float32')
      self.slopes[name] = Worst(f'gradient of {name}', GRADIENT, why)
    self.others = Worst('gradient of tokens that do not count', 0, 'it is exactly none')

  def compare(self, plan: Plan, cfg: routing.RouterConfig, label: str, case: Case) -> None:
    """Takes in all losses of one batch."""
    measured, inputs = measure(plan, cfg, case), inputs_of(plan, case)
    rng = plan.rng(1, cfg.num_experts)
    # A gradient that is wrong anywhere has a wrong slope along a random direction.
    direction = Inputs(*(rng.normal(size=a.shape) for a in inputs))
    middle, above, below = (
      Point(shift(inputs, direction, by), measured.draws, cfg, case.bias) for by in (0, STEP, -STEP)
    )
    for i, loss in enumerate(losses(cfg)):
      if loss.name == 'load' and not cfg.noisy:  # there is no load that noise may give
        continue
      where, f = f'{loss}; {router_name(cfg)}; {label}', equation(loss, cfg, case, measured)
      gradient = Inputs(*(g[i] for g in measured.gradients))
      self.values[loss.name].see(where, relative(measured.values[i], f(middle)))
      slope = (f(above) - f(below)) / (2 * STEP)
      self.slopes[loss.name].see(where, slope_error(gradient, measured.sizes[i], direction, slope))
      self.others.see(where, np.abs(gradient.logits[~case.mask]).max(initial=0))

  def checks(self) -> Iterator[Check]:
    """The checks of each loss, value before slope."""
    for name in self.values:
      yield self.values[name].check()
      yield self.slopes[name].check()
    yield self.others.check()


def check_losses(plan: Plan) -> Iterator[Check]:
  """Checks all losses with all their switches, on whole, padded, packed and odd batches."""
  checks = LossChecks()
  for cfg in plan.token_choice():
    for label, case in make_cases(plan, cfg.num_experts).items():
      some = QUICK_CASES if plan.quick else {*QUICK_CASES, *LARGE_CASES}
      if label in some or (not plan.quick and cfg.num_experts < 64):
        checks.compare(plan, cfg, label, case)
  for cfg in plan.other_routers():
    for label in OTHER_CASES:
      checks.compare(plan, cfg, label, make_cases(plan, cfg.num_experts)[label])
  yield from checks.checks()


def check_every_entry(plan: Plan) -> Iterator[Check]:
  """Checks every entry of the gradient of the first row, not a slope alone: the smallest router."""
  why = 'of the largest entry, or of 1% of what cancels in it; differences in float64'
  worst = Worst('every entry of the gradients', GRADIENT, why)
  for score_fn in sorted(routing.SCORE_FNS):
    cfg, case = routing.RouterConfig(4, 2, score_fn, num_groups=2), make_cases(plan, 4)['holes']
    measured, inputs = measure(plan, cfg, case), inputs_of(plan, case)
    for i, loss in enumerate(losses(cfg)):
      if loss.name in ('load', 'simbal'):  # these have no gradient to logits here
        continue
      f = equation(loss, cfg, case, measured)
      wanted = first_row_gradient(f, Point(inputs, measured.draws, cfg, case.bias), case)
      largest = max(np.abs(wanted).max(), CANCELS * measured.sizes[i])
      error = np.abs(measured.gradients.logits[i][0] - wanted).max()
      worst.see(f'{loss}; {router_name(cfg)}', error / largest)
  yield worst.check()


def first_row_gradient(f: Callable[[Point], float], point: Point, case: Case) -> np.ndarray:
  """The gradient of a loss to the logits of the first row, by finite differences. [S, E]."""

  def loss_of(row: np.ndarray) -> float:
    return f(point.with_logits(np.concatenate([row[None], case.logits[1:]])))

  return oracle.finite_difference(loss_of, case.logits[0])


def check_choices(plan: Plan) -> Iterator[Check]:
  """Checks who is chosen, and the weights of those, for every selection."""
  choice = Worst(
    'experts chosen by top_k', VALUE, 'by how much a chosen score is less than the best, in float64'
  )
  weights = Worst('weights', VALUE, 'absolute, of weights that sum to 1 or scale')
  ties = Worst('ties go to the lowest expert', 0, 'whole numbers')
  for cfg in plan.token_choice():
    for label, case in make_cases(plan, cfg.num_experts).items():
      if cfg.num_experts > 8 and label != 'packed':
        continue
      routed, where = measure(plan, cfg, case).routing, f'{router_name(cfg)}; {label}'
      biased = oracle.scores(case.logits, cfg.score_fn) + case.bias
      limited = group_limited_choice(biased, cfg)
      wanted = oracle_selection.top_k_experts(biased, limited, case.mask, case.segments, cfg.top_k)
      # Scores that differ by rounding may change places: what counts is how good the chosen are.
      best, ids = np.take_along_axis(biased, wanted, -1), routed.expert_ids
      missed = np.abs(best - np.take_along_axis(biased, ids, -1))
      choice.see(where, missed[case.mask].max(initial=0))
      point = Point(inputs_of(plan, case), np.zeros(()), cfg, case.bias)
      off = np.abs(routed.weights - point.weights(ids))
      weights.see(where, off[case.mask].max(initial=0))
      if label in ('ties', 'equal'):
        ties.see(where, (ids != wanted)[case.mask].sum())
  yield choice.check()
  yield ties.check()
  yield from check_other_choices(plan, weights)
  yield weights.check()


def group_limited_choice(choice: np.ndarray, cfg: routing.RouterConfig) -> np.ndarray:
  """The oracle's choice [B, S, E], -inf outside each token's best groups."""

  def limited(token: np.ndarray) -> np.ndarray:
    return oracle_selection.limited_to_groups(token, cfg.num_groups, cfg.top_groups, cfg.group_best)

  return np.apply_along_axis(limited, -1, choice)


def check_other_choices(plan: Plan, weights: Worst) -> Iterator[Check]:
  """Checks selections that are not the best scores: exactly the oracle's experts.

  `weights` takes in the weights of these, too.
  """
  exact = {}
  for cfg in plan.other_routers():
    if cfg.selection != 'top_k':
      what = f'experts chosen by {cfg.selection}'
      exact[cfg.selection] = Worst(what, 0, 'copies that go elsewhere')
  for cfg in plan.other_routers():
    for label in OTHER_CASES:
      case = make_cases(plan, cfg.num_experts)[label]
      measured, where = measure(plan, cfg, case), f'{router_name(cfg)}; {label}'
      point = Point(inputs_of(plan, case), measured.draws, cfg, case.bias)
      ids = measured.routing.expert_ids
      weights.see(where, np.abs(measured.routing.weights - point.weights(ids))[case.mask].max())
      if cfg.selection in exact:
        logs = oracle_selection.log_scores(point.logits, cfg.score_fn)
        token_ids = np.asarray(tokens_of(case.mask, case.segments).ids)
        select = oracle_selection.SELECTIONS[cfg.selection]
        wanted = select(logs, np.exp(logs) + case.bias, case.mask, token_ids, cfg.top_k)
        exact[cfg.selection].see(where, (ids != wanted)[case.mask].sum())
  for worst in exact.values():
    yield worst.check()


def oracle_line(plan: Plan) -> Iterator[Check]:
  """Checks line 1."""
  yield from check_losses(plan)
  if not plan.quick:
    yield from check_every_entry(plan)
  yield from check_choices(plan)
  yield from check_rules(plan)
