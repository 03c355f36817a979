"""Known mistakes of balance losses, each as the value that a loss has that makes it.

  claim, given -> mistake -> value: what explains the values that a function returned

Most were seen in published codebases.

Letters: L layers, B batch, S sequence, E experts, K experts per token.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.equation import Parts, promised, weights_of_claim
from moejax.certify.foreign.given import Given, choose_experts
from moejax.certify.foreign.product_mistakes import (
  normalised,
  product_with,
  score_changes,
  sum_changes,
)
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle.routing import F64, probabilities, scores

Value = Callable[[Claim, Given], float]
# The right parts are made once for all mistakes: scores take most of the time.
Mistake = Callable[[Claim, Given, Parts], float]


def padding_counts(claim: Claim, given: Given) -> float:
  """The promised loss, were padding to count."""
  return promised(claim, given._replace(mask=np.ones_like(given.mask)))


def over_positions(claim: Claim, given: Given) -> float:
  """A mean over tokens that is divided by all positions."""
  return promised(claim, given) * float(given.mask.mean())


def of_sample(claim: Claim, given: Given) -> float:
  """A squared variation with the variance of a sample: over E - 1."""
  return promised(claim, given) * claim.num_experts / (claim.num_experts - 1)


def not_squared(claim: Claim, given: Given) -> float:
  """The coefficient of variation, and not its square. One layer."""
  return claim.factor * math.sqrt(promised(claim, given) / claim.factor)


def unsquared_logsumexp(claim: Claim, given: Given) -> float:
  """Mean of |log Σ exp z| over the tokens that count."""
  top = given.logits.max(-1)
  sums = top + np.log(np.exp(given.logits - top[..., None]).sum(-1))
  counted = np.abs(sums)[:, given.mask]
  return claim.factor * float(counted.mean()) if counted.size else 0.0


def importance_of_scores(claim: Claim, given: Given) -> float:
  """Importance of all scores, not of the weights of the chosen experts alone."""
  return claim.factor * squared_variation_of(probabilities(given.logits, claim.score_fn), given)


def squared_variation_of(values: F64, given: Given) -> float:
  """CV² of sums over the tokens that count, a mean over layers. values [L, B, S, E]."""
  sums = [oracle_balance.summed(of_layer, given.mask) for of_layer in values]
  of_layers = [oracle_balance.squared_variation(of_experts) for of_experts in sums]
  return float(np.mean(of_layers))


def importance_the_other_way(claim: Claim, given: Given) -> float:
  """Importance of weights that are renormalised where they should not be, or the reverse."""
  gates = np.zeros(given.logits.shape)
  for i, (logits, ids) in enumerate(zip(given.logits, given.expert_ids)):
    weights = weights_of_claim(claim, logits, ids)
    if claim.renormalise:
      weights = np.take_along_axis(scores(logits, claim.score_fn), ids, -1)
    else:
      weights = normalised(weights)
    np.put_along_axis(gates[i], ids, weights, -1)
  return claim.factor * squared_variation_of(gates, given)


def load_without_noise(claim: Claim, given: Given) -> float:
  """The load that is counted, for the one that noise may give."""
  noisy = given._replace(logits=given.logits + given.noise)
  ids = choose_experts(claim, noisy.logits, np.zeros(claim.num_experts))
  counts = (ids[..., None] == np.arange(claim.num_experts)).any(-2).astype(np.float64)
  return claim.factor * squared_variation_of(counts, given)


def gram_to_zero(claim: Claim, given: Given) -> float:
  """SimBal without its identity: the sum of |W Wᵀ|."""
  return claim.factor * float(np.abs(given.router.T @ given.router).sum())


def squared_gram(claim: Claim, given: Given) -> float:
  """SimBal with squares for absolute values."""
  gram = given.router.T @ given.router
  return claim.factor * float(((gram - np.eye(len(gram))) ** 2).sum())


VARIATION: dict[str, Value] = {
  'the variance is that of a sample, over E - 1': of_sample,
  'the variation is not squared': not_squared,
  'padding is counted': padding_counts,
}
# like -> mistakes of losses that are not f times P.
OTHERS: dict[str, dict[str, Value]] = {
  'router_z': {
    'logsumexp is not squared': unsquared_logsumexp,
    'padding is counted': padding_counts,
    'the sum is divided by all positions, padding included': over_positions,
  },
  'importance': {
    **VARIATION,
    'all scores are added up, not the weights of the chosen': importance_of_scores,
    'weights are renormalised the other way': importance_the_other_way,
  },
  'load': {
    **VARIATION,
    'copies are counted, not their chances': load_without_noise,
  },
  'simbal': {
    'the Gram matrix is drawn to 0, not to the identity': gram_to_zero,
    'squares stand for absolute values': squared_gram,
  },
}


def without_parts(claim: Claim, given: Given, parts: Parts, value: Value) -> float:
  """The value of a loss that is not made of P and f."""
  return value(claim, given)


def mistakes_of(claim: Claim) -> dict[str, Mistake]:
  """Every known mistake that may be made with this claim, by what is said of it."""
  found: dict[str, Mistake] = {}
  if not claim.is_product:
    for what, value in OTHERS[claim.like].items():
      found[what] = functools.partial(without_parts, value=value)
    return found
  for what, change in {**score_changes(claim), **sum_changes(claim)}.items():
    found[what] = functools.partial(product_with, changes=(change,))
  return found


def pairs_of_mistakes(claim: Claim) -> Iterator[tuple[str, Mistake]]:
  """Every two known mistakes made together, of a loss f times P."""
  if claim.is_product:
    changes = {**score_changes(claim), **sum_changes(claim)}
    for (one, first), (other, second) in itertools.combinations(changes.items(), 2):
      yield f'{one}; and {other}', functools.partial(product_with, changes=(first, second))
