"""Which known mistake explains the values that a foreign function returned.

  (inputs, value, promised value) of all cases -> constant factor, mistake, or both -> a sentence

Letters: E experts, K experts per token, L layers.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.equation import Parts, product_parts
from moejax.certify.foreign.given import Given
from moejax.certify.foreign.mistakes import Mistake, mistakes_of, pairs_of_mistakes

ROOM = 10  # times the tolerance: what has a mistake rounds in other places
UNEXPLAINED = 'no known mistake explains it'


class Sample(NamedTuple):
  """One call: what went in, what came out, and what was promised."""

  where: str
  given: Given
  value: float
  wanted: float


class Traced(NamedTuple):
  """A call whose value is finite, and the parts that the equation makes its value of."""

  sample: Sample
  parts: Parts

  def predicted(self, claim: Claim, mistake: Mistake) -> float:
    """The value of a function that makes a mistake."""
    return mistake(claim, self.sample.given, self.parts)


def relative_distance(claim: Claim, value: float, wanted: float) -> float:
  """How far off a value is, as a part of what is wanted, or of the factor where that is more."""
  return abs(value - wanted) / max(abs(wanted), abs(claim.factor))


def constant_ratio(
  claim: Claim, values: Sequence[float], predicted: Sequence[float], tolerance: float
) -> float:
  """The number that all values are times their predictions; NaN where there is no such number."""
  largest = int(np.argmax(np.abs(predicted)))
  if not predicted[largest]:
    return math.nan
  ratio = values[largest] / predicted[largest]
  for value, prediction in zip(values, predicted):
    # A ratio below 1 makes values, and so their rounding, as much smaller.
    off = relative_distance(claim, value, ratio * prediction) / min(1.0, abs(ratio) or 1.0)
    if off > tolerance:
      return math.nan
  return ratio


def ratio_name(claim: Claim, ratio: float) -> str:
  """'2 times' a value, and what the number may stand for: 'K, the experts per token'."""
  experts, top_k, layers = claim.num_experts, claim.top_k, max(1, claim.layers)
  powers = itertools.product((0, 1, -1), repeat=3)
  # The simplest name first.
  names = []
  for power_k, power_e, power_l in sorted(powers, key=lambda power: sum(map(abs, power))):
    number = float(top_k) ** power_k * float(experts) ** power_e * float(layers) ** power_l
    if number != 1 and math.isclose(ratio, number, rel_tol=1e-4):
      factors = {'K': power_k, 'E': power_e, 'L': power_l if layers > 1 else 0}
      above = ' '.join(name for name, power in factors.items() if power > 0) or '1'
      below = ' '.join(name for name, power in factors.items() if power < 0)
      names.append(f'{above}/{below}' if below else above)
  meaning = f' ({names[0]})' if names else ''
  return f'{ratio:.6g}{meaning} times'


def single_explanations(claim: Claim, calls: Sequence[Traced], tolerance: float) -> Iterator[str]:
  """Every explanation by at most one mistake and a constant factor, the simplest first."""
  values = [call.sample.value for call in calls]
  ratio = constant_ratio(claim, values, [call.sample.wanted for call in calls], tolerance)
  if not math.isnan(ratio):
    documented = claim.factor * ratio
    yield (
      f'the value is {ratio_name(claim, ratio)} what it should be; if that is documented, pass '
      f'factor={documented:.6g}'
    )
    return
  with_factor = []
  for what, mistake in mistakes_of(claim).items():
    predicted = [call.predicted(claim, mistake) for call in calls]
    ratio = constant_ratio(claim, values, predicted, tolerance)
    if math.isclose(ratio, 1, rel_tol=tolerance):
      yield what
    elif not math.isnan(ratio) and ratio:
      with_factor.append(f'{what}; and the value is {ratio_name(claim, ratio)} that')
  yield from with_factor


def paired_explanations(claim: Claim, calls: Sequence[Traced], tolerance: float) -> Iterator[str]:
  """Every explanation by two mistakes made together."""
  for what, mistake in pairs_of_mistakes(claim):
    if all(
      relative_distance(claim, call.sample.value, call.predicted(claim, mistake)) <= tolerance
      for call in calls
    ):
      yield what


def explain(claim: Claim, samples: Sequence[Sample], tolerance: float) -> list[str]:
  """What explains all values, nothing where nothing is wrong with them.

  Values that are not finite are told apart: whatever else is wrong, the others may be explained.
  """
  finite = [sample for sample in samples if math.isfinite(sample.value)]
  infinite = [sample.where for sample in samples if not math.isfinite(sample.value)]
  found = []
  if infinite:
    found.append(f'no finite value of {", ".join(infinite)}: divide by max(sum, 1), or in logs')
  if any(relative_distance(claim, sample.value, sample.wanted) > tolerance for sample in finite):
    # What is wrong is seen first in what is far off.
    finite.sort(key=lambda sample: -relative_distance(claim, sample.value, sample.wanted))
    calls = [Traced(sample, product_parts(claim, sample.given)) for sample in finite]
    explanations = list(single_explanations(claim, calls, ROOM * tolerance))
    if not explanations:
      pairs = paired_explanations(claim, calls, ROOM * tolerance)
      explanations = list(itertools.islice(pairs, 2))
    found.append(' or '.join(explanations[:3]) or UNEXPLAINED)
  return found
