"""Where in its text a run is: how many rows it has seen, also where its batches had other sizes.

Letters: B batch, S sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Stretch(NamedTuple):
  """The steps of a run from one on, up to the next stretch; all their batches have one size."""

  first_step: int  # the number of steps before it
  batch_size: int  # B
  seq_len: int  # S


def rows_seen(stretches: Sequence[Stretch], step: int) -> int:
  """Returns how many rows the first `step` steps of a run have seen, in rows of its last stretch.

  Rows of another length are counted by their tokens.

  Args:
    stretches: of the run, in order; the first begins at 0.
    step: a number of steps.
  """
  ends = [stretch.first_step for stretch in stretches[1:]]
  tokens = 0
  for (first_step, batch_size, seq_len), end in zip(stretches, (*ends, step)):
    tokens += max(min(end, step) - first_step, 0) * batch_size * seq_len
  return tokens // stretches[-1].seq_len


def continued(stretches: Sequence[Stretch], current: Stretch) -> tuple[Stretch, ...]:
  """Returns the stretches of a run that goes on with `current`.

  What it had later than that, in a life that was taken back, is left out.
  """
  earlier = [stretch for stretch in stretches if stretch.first_step < current.first_step]
  if earlier and earlier[-1][1:] == current[1:]:
    return tuple(earlier)
  return (*earlier, current)
