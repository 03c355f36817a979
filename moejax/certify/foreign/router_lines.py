"""What is asked of a foreign router: which experts it chooses, and how it weighs them.

  logits, bias -> the function | the oracle -> experts, and weights of the function's own experts

Letters: B batch, S sequence, E experts, K experts per token, M groups of experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moejax.certify.batches import WHOLE, draw_cases
from moejax.certify.checks import Check, Worst
from moejax.certify.foreign.call import Chosen, Foreign
from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.diagnosis import UNEXPLAINED
from moejax.certify.foreign.equation import weights_of_claim
from moejax.certify.foreign.given import TIED, Given, choose_experts, completed
from moejax.certify.foreign.product_mistakes import EPSILONS
from moejax.certify.oracle.routing import F64, I64, SCORES, best, scores
from moejax.certify.oracle.selection import limited_to_groups

LABELS = ('plain', 'padded', 'packed', 'ties', 'equal', 'extreme', 'all to one', 'one unchosen')
TOLERANCES_OF_ROUTERS = {
  'float32': (2e-6, 'absolute, of scores and of weights over scale; 16 roundings of float32'),
  'float64': (1e-10, 'absolute; float64 has 1e-12 of logits of 1e4'),
}
# Scores whose sum is less are 0 to float32, and weights made of them 0 over 0.
LEAST_SUM = 1e-30


class Decision(NamedTuple):
  """One call of a router."""

  where: str
  given: Given
  chosen: Chosen


def router_given(claim: Claim, takes: frozenset[str], seed: int, dtype: str) -> dict[str, Given]:
  """The batches for a router: all their tokens count. Case -> inputs."""
  cases = draw_cases(np.random.default_rng((seed, 1, 0)), claim.num_experts)
  rng, found = np.random.default_rng((seed, 2)), {}
  for label in (*LABELS, 'low'):
    # Of equal groups it may keep any.
    if label in TIED and claim.num_groups > 1:
      continue
    case = cases[label]._replace(mask=WHOLE > 0, segments=WHOLE)
    bias = case.bias if 'bias' in takes else np.zeros_like(case.bias)
    found[label] = completed(claim, case.logits[None], case, bias[None], rng=rng, dtype=dtype)
  return found


def decide(foreign: Foreign, given: dict[str, Given]) -> Iterator[Decision]:
  """Calls the router on every batch; experts of -1 and weights of NaN where it raises."""
  for label, inputs in given.items():
    shape = inputs.expert_ids.shape[1:]
    try:
      yield Decision(label, inputs, foreign.route(inputs))
    except Exception as error:
      said = f'{label}, raised {type(error).__name__}: {" ".join(str(error).split())[:120]}'
      yield Decision(said, inputs, Chosen(np.full(shape, -1), np.full(shape, math.nan)))


def missed_choice(claim: Claim, decision: Decision) -> float:
  """By how much a chosen expert is worse than the one that should be there.

  Infinite where an expert was chosen twice, or outside a token's best groups.
  """
  given, ids = decision.given, decision.chosen.expert_ids
  ordered = np.sort(ids)
  if ids.min() < 0 or (ordered[..., 1:] == ordered[..., :-1]).any():
    return math.inf
  choice = scores(given.logits[0], claim.score_fn) + given.bias[0]

  def of_token(token: F64) -> F64:
    return limited_to_groups(token, claim.num_groups, claim.top_groups, claim.group_best)

  limited = np.apply_along_axis(of_token, -1, choice)
  found, wanted = (
    -np.sort(-np.take_along_axis(limited, i, -1)) for i in (ids, given.expert_ids[0])
  )
  return float(np.max(wanted - found))


def weights_off(claim: Claim, decision: Decision, wanted: F64) -> float:
  """The largest difference of weights, over scale, of tokens whose scores are not all 0."""
  ids, weights = decision.chosen
  if ids.min() < 0:
    return math.inf
  own = np.take_along_axis(scores(decision.given.logits[0], claim.score_fn), ids, -1)
  defined = own.sum(-1) > LEAST_SUM
  # NaN is the largest of all to NumPy, so that it is not lost.
  return float(np.max(np.abs(weights - wanted)[defined], initial=0.0)) / claim.scale


def choice_checks(foreign: Foreign, decisions: list[Decision]) -> Iterator[Check]:
  """Checks who is chosen: in any order, and any of equal ones."""
  tolerance, why = TOLERANCES_OF_ROUTERS[foreign.dtype]
  worst = Worst('experts chosen', tolerance, why)
  for decision in decisions:
    worst.see(decision.where, missed_choice(foreign.claim, decision))
  yield worst.check()


def weight_checks(foreign: Foreign, decisions: list[Decision]) -> Iterator[Check]:
  """Checks the weights of the experts that the router chose, right or wrong."""
  tolerance, why = TOLERANCES_OF_ROUTERS[foreign.dtype]
  worst, low = Worst('weights', tolerance, why), Worst('weights, low scores', tolerance, why)
  for decision in decisions:
    logits, ids = decision.given.logits[0], decision.chosen.expert_ids
    wanted = weights_of_claim(foreign.claim, logits, ids)
    check = low if decision.where.startswith('low') else worst
    check.see(decision.where, weights_off(foreign.claim, decision, wanted))
  yield worst.check()
  yield low.check()


def chosen_with(claim: Claim, given: Given, fields: dict[str, object]) -> I64:
  """The choice of a claim with other fields."""
  return choose_experts(dataclasses.replace(claim, **fields), given.logits[0], given.bias[0])


def without_bias(claim: Claim, given: Given) -> I64:
  """The choice by scores alone."""
  return choose_experts(claim, given.logits[0], np.zeros(claim.num_experts))


def bias_on_logits(claim: Claim, given: Given) -> I64:
  """The choice by scores of logits plus bias."""
  return choose_experts(claim, given.logits[0] + given.bias[0], np.zeros(claim.num_experts))


def outside_at_zero(claim: Claim, given: Given) -> I64:
  """The choice with 0, not minus infinity, outside the best groups."""
  choice = scores(given.logits[0], claim.score_fn) + given.bias[0]

  def of_token(token: F64) -> I64:
    limited = limited_to_groups(token, claim.num_groups, claim.top_groups, claim.group_best)
    return np.array(best(np.where(np.isinf(limited), 0, limited), claim.top_k))

  return np.apply_along_axis(of_token, -1, choice)


def choice_mistakes(claim: Claim) -> dict[str, Callable[[Claim, Given], I64]]:
  """Known mistakes of a choice, by what is said of them."""
  mistakes = {
    'the bias is left out of the choice': without_bias,
    'the bias is added to the logits, not to the scores': bias_on_logits,
  }
  changed: dict[str, dict[str, object]] = {}
  for name in sorted(set(SCORES) - {claim.score_fn}):
    changed[f'experts are chosen by {name} in place of {claim.score_fn}'] = {'score_fn': name}
  if claim.num_groups > 1:
    mistakes['experts outside the best groups have the choice 0'] = outside_at_zero
    changed['groups are left out'] = {'num_groups': 1, 'top_groups': 1}
    for size in {1, 2, claim.top_k, claim.num_experts // claim.num_groups} - {claim.group_best}:
      changed[f'a group is worth the sum of its {size} best'] = {'group_best': size}
  for what, fields in changed.items():
    mistakes[what] = functools.partial(chosen_with, fields=fields)
  return mistakes


def weighed_with(claim: Claim, given: Given, ids: I64, fields: dict[str, object]) -> F64:
  """The weights of a claim with other fields."""
  return weights_of_claim(dataclasses.replace(claim, **fields), given.logits[0], ids)


def biased_weights(claim: Claim, given: Given, ids: I64) -> F64:
  """Weights that are made of scores plus bias."""
  weights = np.take_along_axis(scores(given.logits[0], claim.score_fn) + given.bias[0], ids, -1)
  total = weights.sum(-1, keepdims=True) if claim.renormalise else 1.0
  return claim.scale * weights / total


def weights_with_epsilon(claim: Claim, given: Given, ids: I64, epsilon: float) -> F64:
  """Weights with an epsilon in the sum that renormalises."""
  weights = np.take_along_axis(scores(given.logits[0], claim.score_fn), ids, -1)
  return claim.scale * weights / (weights.sum(-1, keepdims=True) + epsilon)


def weight_mistakes(claim: Claim) -> dict[str, Callable[[Claim, Given, I64], F64]]:
  """Known mistakes of weights, by what is said of them."""
  mistakes: dict[str, Callable[[Claim, Given, I64], F64]] = {
    'the bias is inside the weights': biased_weights
  }
  changed: dict[str, dict[str, object]] = {
    'the scale is dropped': {'scale': 1.0},
    'weights are the softmax of the chosen logits': {'weigh': 'softmax', 'renormalise': True},
  }
  if claim.weigh == 'scores':
    other = 'not renormalised' if claim.renormalise else 'renormalised'
    changed[f'weights are {other}'] = {'renormalise': not claim.renormalise}
  for name in sorted(set(SCORES) - {claim.score_fn}):
    what = f'weights are made of {name} in place of {claim.score_fn}'
    changed[what] = {'score_fn': name, 'weigh': 'scores'}
  for what, fields in changed.items():
    mistakes[what] = functools.partial(weighed_with, fields=fields)
  if claim.renormalise and claim.weigh == 'scores':
    for epsilon in EPSILONS:
      what = f'an epsilon of {epsilon:g} in the sum that renormalises weights'
      mistakes[what] = functools.partial(weights_with_epsilon, epsilon=epsilon)
  return mistakes


def explain_choice(claim: Claim, decisions: list[Decision], tolerance: float) -> str:
  """Which known mistake explains the experts of all batches without ties, '' where none is off."""
  if all(missed_choice(claim, decision) <= tolerance for decision in decisions):
    return ''
  plain = [decision for decision in decisions if not decision.where.startswith(TIED)]
  found = []
  for what, choose in choice_mistakes(claim).items():
    if all(
      np.array_equal(np.sort(choose(claim, given)), np.sort(chosen.expert_ids))
      for _, given, chosen in plain
    ):
      found.append(what)
  return ' or '.join(found) or UNEXPLAINED


def explain_weights(claim: Claim, decisions: list[Decision], tolerance: float) -> str:
  """Which known mistake explains the weights of all batches, '' where none is off."""
  right: dict[str, Callable[[Claim, Given, I64], F64]] = {
    '': functools.partial(weighed_with, fields={})
  }
  found = []
  for what, weigh in {**right, **weight_mistakes(claim)}.items():
    off = []
    for decision in decisions:
      if decision.chosen.expert_ids.min() >= 0:
        wanted = weigh(claim, decision.given, decision.chosen.expert_ids)
        off.append(weights_off(claim, decision, wanted))
    if off and max(off) <= tolerance:
      found.append(what)
  return ' or '.join(found) if found else UNEXPLAINED
