"""What the lines of the contract find: deviations of many cases, and the worst of them.

  deviations of many cases -> Worst -> Check -> Result of a line -> Certificate

Every deviation is a distance between two computations of the same thing. A check keeps the largest
over all its cases, with the name of the case that it is from.
"""

import dataclasses
import math
from typing import NamedTuple


class Check(NamedTuple):
  """One comparison over many cases: how far off the worst of them is, and how far off it may be."""

  what: str  # is compared: 'gradient of global_batch'
  worst: float  # deviation; never NaN, which counts as infinitely far off
  tolerance: float  # the largest deviation that passes; 0: must be exact
  why: str  # the tolerance is this much, and of what the deviation is a fraction
  where: str  # the worst deviation was seen: the name of the case
  cases: int  # how many were compared

  @property
  def passed(self) -> bool:
    """Whether the worst case is within the tolerance. A check that looked at nothing fails."""
    return self.cases > 0 and self.worst <= self.tolerance

  @property
  def used(self) -> float:
    """The part of the tolerance that the worst case uses up, 0 to 1; infinite if it failed."""
    if not self.passed:
      return math.inf
    # An exact check that passed has a tolerance of 0, by which nothing can be divided.
    return self.worst / self.tolerance if self.worst else 0.0


def worse(one: Check, other: Check) -> Check:
  """The same comparison made twice, as one: the larger deviation, and all cases."""
  return max(one, other, key=lambda check: check.worst)._replace(cases=one.cases + other.cases)


class Worst:
  """A check in the making: looks at deviations one by one and keeps the largest."""

  def __init__(self, what: str, tolerance: float, why: str) -> None:
    self.what, self.tolerance, self.why = what, tolerance, why
    self.worst, self.where, self.cases = 0.0, '', 0

  def see(self, where: str, deviation: float) -> None:
    """Takes in one case, by its name. A deviation of NaN counts as infinite."""
    # Every comparison with NaN is false, so that the largest of NaNs and numbers would pass.
    deviation = math.inf if math.isnan(deviation) else abs(float(deviation))
    if not self.cases or deviation > self.worst:
      self.worst, self.where = deviation, where
    self.cases += 1

  def check(self) -> Check:
    """The check over all cases that were seen so far."""
    return Check(
      what=self.what,
      worst=self.worst,
      tolerance=self.tolerance,
      why=self.why,
      where=self.where or 'no case',
      cases=self.cases,
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """One line of the contract, with all of its checks."""

  name: str
  number: int  # of the line in the contract, from 1
  promise: str
  checks: tuple[Check, ...]
  seconds: float
  notes: tuple[str, ...] = ()  # what a line found out besides its checks

  @property
  def passed(self) -> bool:
    """Whether there is a check and all of them passed."""
    return bool(self.checks) and all(check.passed for check in self.checks)

  @property
  def cases(self) -> int:
    """How many comparisons were made in all checks."""
    return sum(check.cases for check in self.checks)

  @property
  def tightest(self) -> Check:
    """The check that came nearest to failing, or that failed by most."""
    return max(self.checks, key=lambda check: (not check.passed, check.used, check.worst))


class Certificate(NamedTuple):
  """All lines, and what is needed to make them again."""

  results: list[Result]
  about: dict[str, object]  # versions, commit, seed, covered, ...

  @property
  def passed(self) -> bool:
    """Whether there is a line and all of them passed."""
    return bool(self.results) and all(result.passed for result in self.results)


def number(x: float) -> str:
  """A deviation for a reader: '2.0e-7'; '0' is exact, 'inf' is not a number or not finite."""
  if not x:
    return '0'
  return f'{x:.1e}'.replace('e-0', 'e-').replace('e+0', 'e') if math.isfinite(x) else 'inf'


def allowed(x: float) -> str:
  """A tolerance for a reader: '1e-6', or 'exact' for 0."""
  return f'{x:.0e}'.replace('e-0', 'e-') if x else 'exact'
