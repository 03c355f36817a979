"""The report sets held-out text beside training text, and says where it is better."""

import math
from types import SimpleNamespace

import pytest

from moejax.data.pipeline import Size
from moejax.train.telemetry.held_out_report import (
  Sides,
  compare_sides,
  comparison_lines,
  tail_start,
)

BITS = 1 / math.log(2)


def data(*tasks: str) -> SimpleNamespace:
  return SimpleNamespace(tasks=tasks, sizes=[Size(0, 0, 0, 0, 2.0 + i) for i in range(len(tasks))])


def evaluated(*suffixes: str) -> dict[str, float]:
  parts = ('', '_low', '_high')
  return {f'eval/bits_per_byte{part}{s}': i for s in suffixes for i, part in enumerate(parts, 1)}


def test_the_last_tenth_has_one_step_at_least() -> None:
  assert [tail_start(steps) for steps in (1, 2, 10, 11, 25, 500)] == [0, 1, 9, 9, 22, 450]


def test_training_is_the_mean_of_the_last_tenth_of_the_steps() -> None:
  rows = [{'step': step, 'nll': float(step)} for step in range(1, 31)]
  rows += [{'step': 30, **evaluated('')}, {'step': 30, 'saves_failed': 1}]
  rows[-4]['nll'] = None  # step 29 was skipped
  (of,) = compare_sides(rows, rows[-2], 30, data('only')).values()
  assert of.training == pytest.approx((28 + 30) / 2 * BITS / 2)
  assert of[1:] == (1, 2, 3)


def test_of_a_mixture_each_task_is_compared() -> None:
  rows = [
    {'step': 19, 'nll': 9.0, 'lm_loss/a': 4.0, 'lm_loss/b': None},
    {'step': 20, 'nll': 9.0, 'lm_loss/a': 2.0, 'lm_loss/b': 6.0},
  ]
  found = compare_sides(
    rows, evaluated('', '/a') | {'eval/bits_per_byte/b': None}, 20, data('a', 'b')
  )
  assert found['a'] == pytest.approx((3 * BITS / 2, 1, 2, 3))
  assert found['b'].training == pytest.approx(6 * BITS / 3)
  assert all(math.isnan(value) for value in found['b'][1:])
  lines = comparison_lines(found)
  assert [line.split(',')[0] for line in lines] == [
    'held out 1.0000 bits per byte of a',
    'training 2.1640 bits per byte of a',
    'better   held-out text of a is better than training text',
    'held out nan bits per byte of b',
    'training 2.8854 bits per byte of b',
  ]


@pytest.mark.parametrize(
  ('sides', 'words'),
  [
    (Sides(1.637, 1.481, 1.3, 1.6), 'is better than training text, by more than the interval'),
    (Sides(1.637, 1.581, 1.4, 1.7), 'is better than training text, within the interval'),
    (Sides(1.637, 1.662, 1.5, 1.8), ''),
  ],
)
def test_a_person_reads_when_held_out_text_is_better(sides: Sides, words: str) -> None:
  lines = comparison_lines({'stdlib': sides})
  assert lines[0].endswith(f'interval over documents {sides.low:.4f} to {sides.high:.4f}')
  assert len(lines) == 2 + bool(words) and words in '\n'.join(lines)


def test_of_few_documents_there_is_no_interval_to_be_within() -> None:
  lines = comparison_lines({'kjv': Sides(1.5, 1.4, math.nan, math.nan)})
  assert lines[0] == 'held out 1.4000 bits per byte, of too few documents for an interval'
  assert 'is better than training text: it is easier' in lines[2]
