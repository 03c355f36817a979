"""Mistakes of losses f times P, each as a change of the parts that the loss is made of.

  Parts as the equation has them -> changes -> Parts of a function that makes these mistakes

Letters: L layers, B batch, S sequence, E experts, K experts per token.
"""

import functools
from collections.abc import Callable

import numpy as np

from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.equation import Parts, product
from moejax.certify.foreign.given import Given, choose_experts, counts_unbiased_choice
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle.routing import F64, I64, SCORES, best, probabilities, scores

EPSILONS = (1e-20, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
Change = Callable[[Claim, Given, Parts], Parts]


def normalised(values: F64, epsilon: float = 0.0) -> F64:
  """Values over their sum over experts, plus epsilon; 0 where that is 0. [..., E]."""
  total = values.sum(-1, keepdims=True) + epsilon
  return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


def in_bfloat16(values: F64) -> F64:
  """Values rounded to bfloat16: the upper half of a float32, to the nearest, ties to even."""
  bits = np.asarray(values, np.float32).view(np.uint32)
  rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
  return ((bits + rounding) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def with_epsilon(claim: Claim, given: Given, parts: Parts, epsilon: float) -> Parts:
  """Scores over their sum plus epsilon."""
  raw = scores(given.logits, claim.probability or claim.score_fn)
  return parts._replace(p=normalised(raw, epsilon))


def with_scores_of(claim: Claim, given: Given, parts: Parts, score_fn: str) -> Parts:
  """P made of another score function."""
  return parts._replace(p=probabilities(given.logits, score_fn))


def not_normalised(claim: Claim, given: Given, parts: Parts) -> Parts:
  """P is the score as it is."""
  return parts._replace(p=scores(given.logits, claim.probability or claim.score_fn))


def softmax_of_scores(claim: Claim, given: Given, parts: Parts) -> Parts:
  """P is the softmax of what are scores already."""
  return parts._replace(p=probabilities(scores(given.logits, claim.score_fn), 'softmax'))


def chosen_alone(claim: Claim, given: Given, parts: Parts, renormalise: bool) -> Parts:
  """P is 0 for the experts that were not chosen."""
  of_token = (given.expert_ids[..., None] == np.arange(claim.num_experts)).any(-2)
  p = parts.p * of_token
  return parts._replace(p=normalised(p) if renormalise else p)


def scores_with_bias(claim: Claim, given: Given, parts: Parts, by_softmax: bool) -> Parts:
  """P is made of scores plus bias."""
  biased = scores(given.logits, claim.score_fn) + given.bias[:, None, None, :]
  return parts._replace(p=probabilities(biased, 'softmax') if by_softmax else normalised(biased))


def logits_with_bias(claim: Claim, given: Given, parts: Parts) -> Parts:
  """P is made of logits plus bias."""
  return parts._replace(
    p=probabilities(given.logits + given.bias[:, None, None, :], claim.score_fn)
  )


def rounded_logits(claim: Claim, given: Given, parts: Parts) -> Parts:
  """Scores are made of logits in bfloat16."""
  return parts._replace(p=probabilities(in_bfloat16(given.logits), claim.score_fn))


def sets_with_padding(sets: I64) -> I64:
  """The sets, padding being in that of the token before it, or in one of its row's own."""
  filled, following = sets.copy(), int(sets.max()) + 1
  for b, s in np.ndindex(sets.shape):
    if filled[b, s] < 0:
      filled[b, s] = filled[b, s - 1] if s else following + b
  return filled


def with_padding(claim: Claim, given: Given, parts: Parts, in_p: bool, in_f: bool) -> Parts:
  """Padding counts in P, in f or in both."""
  everybody = np.ones_like(parts.mask)
  mask = everybody if in_p else parts.mask
  load_mask = everybody if in_f else parts.load_mask
  return parts._replace(sets=sets_with_padding(parts.sets), mask=mask, load_mask=load_mask)


def over_all_positions(claim: Claim, given: Given, parts: Parts) -> Parts:
  """The sum of P is divided by all positions."""
  return parts._replace(sets=sets_with_padding(parts.sets), all_positions=True)


def counts_dispatched(claim: Claim, given: Given, parts: Parts) -> Parts:
  """f counts the choice with bias and groups."""
  return parts._replace(chosen=choose_experts(claim, given.logits, given.bias[:, None, None, :]))


def counts_unbiased(claim: Claim, given: Given, parts: Parts) -> Parts:
  """f counts the best scores, without bias and groups."""
  raw = scores(given.logits, claim.score_fn)
  return parts._replace(
    chosen=np.apply_along_axis(lambda s: np.array(best(s, claim.top_k)), -1, raw)
  )


def counts_first(claim: Claim, given: Given, parts: Parts) -> Parts:
  """f counts the best expert of each token alone."""
  return parts._replace(chosen=given.expert_ids[..., :1])


def counts_all(claim: Claim, given: Given, parts: Parts) -> Parts:
  """f counts all chosen experts."""
  return parts._replace(chosen=given.expert_ids)


def sets_of_rows(claim: Claim, given: Given, parts: Parts, groups: int) -> Parts:
  """Sets are runs of rows."""
  return parts._replace(sets=oracle_balance.row_sets(parts.sets.shape, groups))


def sets_of_documents(claim: Claim, given: Given, parts: Parts) -> Parts:
  """Sets are documents."""
  return parts._replace(sets=oracle_balance.document_sets(given.segment_ids))


def weighed_by_length(claim: Claim, given: Given, parts: Parts, power: int) -> Parts:
  """Sets weigh by a power of how many of their tokens count."""
  return parts._replace(length_power=power)


def other_layers(claim: Claim, given: Given, parts: Parts) -> Parts:
  """Layers are pooled where they should be averaged, and averaged where they should be pooled."""
  return parts._replace(pooled=not parts.pooled)


def single_experts(claim: Claim, given: Given, parts: Parts) -> Parts:
  """Experts are balanced, not groups of them."""
  return parts._replace(partition=0)


def score_changes(claim: Claim) -> dict[str, Change]:
  """Mistakes in how P is made of logits, by what is said of them."""
  own, changes = claim.probability or claim.score_fn, {}
  for name in sorted(set(SCORES) - {own}):
    scored = name if name == 'softmax' else f'normalised {name}'
    wanted = own if own == 'softmax' else f'normalised {own}'
    what = f'P is the {scored} in place of the {wanted}'
    changes[what] = functools.partial(with_scores_of, score_fn=name)
  if own == 'softmax':
    changes['P is a softmax of a softmax'] = softmax_of_scores
  else:
    changes[f'P is the softmax of {own} scores'] = softmax_of_scores
    changes[f'P is the raw {own}, not over its sum'] = not_normalised
    for epsilon in EPSILONS:
      what = f'an epsilon of {epsilon:g} in the sum that normalises scores'
      changes[what] = functools.partial(with_epsilon, epsilon=epsilon)
  return changes | {
    'P sees only the chosen experts (top-k weights for full scores)': functools.partial(
      chosen_alone, renormalise=True
    ),
    'P sees only the chosen experts, not renormalised': functools.partial(
      chosen_alone, renormalise=False
    ),
    'the bias is inside P (scores plus bias, normalised)': functools.partial(
      scores_with_bias, by_softmax=False
    ),
    'the bias is inside P (softmax of scores plus bias)': functools.partial(
      scores_with_bias, by_softmax=True
    ),
    'the bias is inside P (added to the logits)': logits_with_bias,
    'logits are rounded to bfloat16': rounded_logits,
  }


def sum_changes(claim: Claim) -> dict[str, Change]:
  """Mistakes in what is added up, and over what, by what is said of them."""
  changes = {
    'padding is counted': functools.partial(with_padding, in_p=True, in_f=True),
    'padding is counted in P': functools.partial(with_padding, in_p=True, in_f=False),
    'padding is counted in f': functools.partial(with_padding, in_p=False, in_f=True),
    'P is divided by all positions, padding included': over_all_positions,
    'a set is the whole batch': functools.partial(sets_of_rows, groups=1),
    'a set is two rows': functools.partial(sets_of_rows, groups=2),
    'a set is a row, whatever its documents': functools.partial(sets_of_rows, groups=4),
    'a set is a document': sets_of_documents,
    'sets weigh by their length': functools.partial(weighed_by_length, power=1),
    'sets weigh by the square of their length': functools.partial(weighed_by_length, power=2),
  }
  if counts_unbiased_choice(claim):
    changes['f counts what was dispatched, with bias and groups'] = counts_dispatched
  else:
    changes['f counts the best scores, without bias and groups'] = counts_unbiased
  if claim.like == 'gshard':
    changes['f counts all choices'] = counts_all
  else:
    changes['f counts the first choice alone'] = counts_first
  if claim.partition:
    changes['single experts are balanced, not groups of them'] = single_experts
  if claim.layers > 1:
    averaged = 'layers are averaged, not pooled'
    pooled = 'layers are pooled: f and P are means over the tokens of all layers'
    changes[averaged if claim.pooled else pooled] = other_layers
  return changes


def product_with(claim: Claim, given: Given, parts: Parts, changes: tuple[Change, ...]) -> float:
  """The value of a loss f times P that makes these mistakes; `parts` are the right ones."""
  for change in changes:
    parts = change(claim, given, parts)
  return claim.factor * product(parts)
