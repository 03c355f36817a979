"""The first case of a line of the certificate that is beyond its tolerance, and no more of it."""

import pytest

from moejax.certify import contract
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst

PATCH = pytest.MonkeyPatch


class CaughtError(BaseException):
  """A case is beyond its tolerance. No Exception: of one of those a line would make a check."""

  def __init__(self, check: Check) -> None:
    super().__init__(check.what)
    self.check = check


def first_failure(line: str) -> Check | None:
  """The first check that a line, in its quick form, does not pass.

  One case beyond its tolerance fails a check, whatever the other cases are: the line stops there,
  which is most of the time that a mutant takes.
  """
  see = Worst.see

  def see_and_stop(worst: Worst, where: str, deviation: float) -> None:
    see(worst, where, deviation)
    check = worst.check()
    if not check.passed:
      raise CaughtError(check)

  with PATCH.context() as patch:
    patch.setattr(Worst, 'see', see_and_stop)
    try:
      for finding in contract.findings(line, Plan(quick=True)):
        # A check that saw no case has failed, too.
        if isinstance(finding, Check) and not finding.passed:
          return finding
    except CaughtError as caught:
      return caught.check
  return None
