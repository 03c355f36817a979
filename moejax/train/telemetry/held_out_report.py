"""Held-out text beside training text, for the final report: can the number be believed?

A model that has learned nothing by heart is as good on held-out text as on training text that it
meets for the first time, and worse on it where epochs repeat. Better is a reason to look at the
split.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moejax.data.pipeline import Data
from moejax.train.telemetry.document_interval import CONFIDENCE
from moejax.train.telemetry.metric_rows import BITS_PER_NAT

Rows = Sequence[Mapping[str, object]]


class Sides(NamedTuple):
  """Bits per byte of a task's text; NaN where they are not known."""

  training: float  # over the last tenth of the steps
  held_out: float
  low: float  # of the interval of held_out
  high: float


def tail_start(steps: int) -> int:
  """The step after which the last tenth of the steps begins; that has one step at least."""
  return steps - math.ceil(steps / 10)


def compare_sides(
  rows: Rows, last: Mapping[str, object], steps: int, data: Data
) -> dict[str, Sides]:
  """Both sides of each task's text.

  The loss of training is a mean over steps, each of tokens that it had not learned from. Steps that
  were skipped, or had no token of the task, are left out.

  Args:
    rows: of metrics.jsonl.
    last: all rows of the last step in one.
    steps: of the run.
    data: whose tasks and bytes per token are asked for.
  """
  tail = [row for row in rows if row['step'] > tail_start(steps)]
  found = {}
  for task, size in zip(data.tasks, data.sizes, strict=True):
    has_siblings = len(data.tasks) > 1
    suffix = f'/{task}' if has_siblings else ''
    loss = f'lm_loss/{task}' if has_siblings else 'nll'
    # JSON has null for what was not finite.
    nats = [row[loss] for row in tail if loss in row and row[loss] is not None]
    mean = sum(nats) / len(nats) if nats else math.nan
    held_out = [
      number_in(last, f'eval/bits_per_byte{part}{suffix}') for part in ('', '_low', '_high')
    ]
    found[task] = Sides(mean * BITS_PER_NAT / size.bytes_per_token, *held_out)
  return found


def number_in(row: Mapping[str, object], name: str) -> float:
  """The number; NaN where it was not finite, or is not there since the disk was full."""
  return row[name] if name in row and row[name] is not None else math.nan


def comparison_lines(sides: Mapping[str, Sides]) -> list[str]:
  """Both sides for a person, and where held-out text is the better one, that."""
  lines = []
  for task, of in sides.items():
    where = f' of {task}' if len(sides) > 1 else ''
    lines += [
      f'held out {of.held_out:.4f} bits per byte{where}, {interval_text(of)}',
      f'training {of.training:.4f} bits per byte{where}, over the last tenth of the steps',
    ]
    if of.held_out < of.training:
      lines.append(
        f'better   held-out text{where} is better than training text{amount_text(of)}: it is '
        'easier text, or near to what is trained on'
      )
  return lines


def interval_text(of: Sides) -> str:
  """The interval in words."""
  if math.isnan(of.low):
    return 'of too few documents for an interval'
  return f'{CONFIDENCE:.0%} interval over documents {of.low:.4f} to {of.high:.4f}'


def amount_text(of: Sides) -> str:
  """Whether held-out text is better by more than chance would have it, '' where none can tell."""
  if math.isnan(of.high):
    return ''
  return ', by more than the interval' if of.high < of.training else ', within the interval'
