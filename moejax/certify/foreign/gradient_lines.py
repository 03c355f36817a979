"""What is asked of a foreign loss's gradient: the one it returns, or the differences of its values.

  gradient -> slope along a drawn direction | difference of the oracle
  values a step apart -> difference | difference of the oracle, of the same step

Letters: L layers, B batch, S sequence, D model, E experts.
"""

import math
from collections.abc import Iterator

import numpy as np

from moejax.certify.checks import Check, Worst
from moejax.certify.foreign.call import value_or_nan
from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.equation import promised
from moejax.certify.foreign.given import Given, counted_experts
from moejax.certify.foreign.loss_lines import Asked

STEP = 1e-5  # of differences in float64: errors of 1e-10 both by cutting and by rounding
WIDE_STEP = 2.0**-5  # of differences in float32
DIRECTIONS = 2  # along which each gradient is compared
# Of a gradient at logits of 1e4, where a step of the oracle is rounded to parts of 1e-7.
EXTREME = (1e-5, 'of its norm; differences of float64 at 1e4')
# Of a function that gives no gradient. The oracle is differenced with the same step, so that
# cutting off cancels: what is left is the rounding of two values, divided by two steps.
DIFFERENCES = {
  'float64': (1e-6, 'of its usual norm; differences of float64, of a step of 1e-5'),
  'float32': (1e-3, 'of its usual norm; rounding of float32 over a step of 1/32'),
}


def moved_along(given: Given, subject: str, direction: np.ndarray, by: float) -> Given:
  """Inputs a step along a direction of the subject; the experts stand."""
  return given._replace(**{subject: getattr(given, subject) + by * direction})


def draw_direction(asked: Asked, given: Given, rng: np.random.Generator, step: float) -> np.ndarray:
  """A direction [L, B, S, E] or [D, E], of entries in -1 to 1, along which nobody changes experts.

  That matters to a function that chooses by itself: its difference would be of two choices.
  """
  claim, subject = asked.claim, asked.claim.equation.subject
  direction = rng.uniform(-1, 1, getattr(given, subject).shape)
  if subject != 'logits' or 'expert_ids' in asked.foreign.takes:
    return direction
  before = np.sort(counted_experts(claim, given.logits, given.bias))
  for by in (step, -step):
    after = np.sort(counted_experts(claim, given.logits + by * direction, given.bias))
    direction *= (before == after).all(-1, keepdims=True)
  return direction


def usual_norm(claim: Claim, given: Given, wanted: float) -> float:
  """A gradient's size where every token adds alike to a value: value / sqrt(tokens, experts)."""
  entries = max(1, int(given.mask.sum())) * claim.num_experts * len(given.logits)
  return max(abs(wanted), abs(claim.factor)) / math.sqrt(entries)


def oracle_slope(
  claim: Claim, given: Given, subject: str, direction: np.ndarray, step: float
) -> float:
  """The central difference of the oracle."""
  above, below = (moved_along(given, subject, direction, by) for by in (step, -step))
  return (promised(claim, above) - promised(claim, below)) / (2 * step)


class SlopePairs:
  """Slopes of the function and of the oracle, side by side."""

  def __init__(self, what: str, tolerance: float, why: str) -> None:
    self.worst, self.pairs = Worst(what, tolerance, why), []

  def see(self, where: str, slope: float, wanted: float, norm: float) -> None:
    """Takes in one slope."""
    self.worst.see(f'{where}: slope {slope:.5g} for {wanted:.5g}', (slope - wanted) / norm)
    self.pairs.append((slope, wanted, norm))

  def explanation(self) -> str:
    """What is wrong with all slopes at once, '' where nothing is or nothing is known."""
    if self.worst.check().passed or not np.all(np.isfinite(self.pairs)):
      return ''
    slopes, wanted, norms = np.array(self.pairs).T
    if not slopes.any():
      return 'the gradient is 0: P has none, or it was detached'
    ratio = float(slopes @ wanted / (wanted @ wanted))
    if math.isclose(ratio, 1, rel_tol=1e-3):
      return ''  # one of them is off, not all
    room = 10 * self.worst.tolerance * max(1.0, abs(ratio))
    if np.all(np.abs(slopes - ratio * wanted) / norms <= room):
      return f'the gradient is {ratio:.5g} times that of the value'
    return ''


def gradient_checks(asked: Asked) -> Iterator[Check | str]:
  """Checks the gradient to the logits: the one that is returned, or the value's differences."""
  plain = asked.kinds['whole rows']['plain']
  if asked.foreign.loss(plain).gradient is None:
    yield from check_differences(asked)
  else:
    yield from check_returned(asked)


def check_returned(asked: Asked) -> Iterator[Check | str]:
  """Checks a gradient that is returned: its slopes, and 0 for tokens that do not count."""
  tolerance, claim = asked.tolerance, asked.claim
  what = 'gradient, along drawn directions'
  slopes = SlopePairs(what, tolerance.gradient, tolerance.gradient_why)
  extreme = SlopePairs('gradient, extreme logits', *EXTREME)
  others = Worst('gradient of tokens that do not count', 0, 'it is exactly none')
  rng, subject = np.random.default_rng((asked.seed, 6)), claim.equation.subject
  for kind, cases in asked.kinds.items():
    seen = extreme if kind == 'extreme logits' else slopes
    for label, given in cases.items():
      returned, raised = value_or_nan(asked.foreign, given)
      gradient = returned.gradient
      if gradient is None:
        seen.see(f'{label}{raised}', math.nan, math.nan, 1)
        continue
      norm = max(float(np.linalg.norm(gradient)), usual_norm(claim, given, returned.value))
      for _ in range(DIRECTIONS):
        direction = rng.uniform(-1, 1, gradient.shape)
        wanted = oracle_slope(claim, given, subject, direction, STEP)
        seen.see(label, float((gradient * direction).sum()), wanted, norm)
      if subject == 'logits' and not given.mask.all():
        others.see(label, float(np.abs(gradient[:, ~given.mask]).max()))
  for worst in (slopes.worst, extreme.worst, others):
    if worst.cases:
      yield worst.check()
  if explanation := slopes.explanation():
    yield explanation


def differences_dtype(asked: Asked) -> str:
  """The floats to difference the function with: float64 where it keeps them.

  Then three steps of 1e-8 change its value three times as much as one. A function that rounds to
  float32 does not see such steps, or sees a few of its inputs jump.
  """
  plain, subject = asked.kinds['whole rows']['plain'], asked.claim.equation.subject
  rng = np.random.default_rng((asked.seed, 7))
  wide = asked.foreign.with_dtype('float64')
  for _ in range(DIRECTIONS):
    direction = rng.uniform(-1, 1, getattr(plain, subject).shape)
    values = []
    for by in (0, 1e-8, 3e-8):
      returned, raised = value_or_nan(wide, moved_along(plain, subject, direction, by))
      if raised:
        return 'float32'
      values.append(returned.value)
    once, thrice = values[1] - values[0], values[2] - values[0]
    if not once or abs(thrice - 3 * once) > 0.03 * abs(once):
      return 'float32'
  return 'float64'


def check_differences(asked: Asked) -> Iterator[Check | str]:
  """Checks the differences of the values of a function that gives no gradient."""
  claim, dtype = asked.claim, differences_dtype(asked)
  foreign = asked.foreign.with_dtype(dtype)
  step = STEP if dtype == 'float64' else WIDE_STEP
  slopes = SlopePairs('differences of the value', *DIFFERENCES[dtype])
  rng, subject = np.random.default_rng((asked.seed, 8)), claim.equation.subject
  for kind, cases in asked.kinds.items():
    if kind in ('extreme logits', 'no token that counts'):
      continue  # no step is small beside 1e4, and nothing is there to differ
    for label, given in cases.items():
      direction = draw_direction(asked, given, rng, step)
      above, below = (
        moved_along(given, subject, direction.astype(dtype).astype(np.float64), by)
        for by in (step, -step)
      )
      (high, raised), (low, _) = value_or_nan(foreign, above), value_or_nan(foreign, below)
      slope = (high.value - low.value) / (2 * step)
      wanted = (promised(claim, above) - promised(claim, below)) / (2 * step)
      norm = usual_norm(claim, given, high.value if math.isfinite(high.value) else 1.0)
      slopes.see(f'{label}{raised}', slope, wanted, norm)
  yield slopes.worst.check()
  if explanation := slopes.explanation():
    yield explanation
