"""A place in the text is a count of rows seen: no change of the batch skips or repeats one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moejax.data.position import Stretch, continued, rows_seen
from tests.data.plain_texts import open_text


@pytest.mark.parametrize(
  ('stretches', 'seen'),
  [
    ([Stretch(0, 2, 8)], [0, 2, 4, 6, 8, 10]),
    ([Stretch(0, 2, 8), Stretch(2, 4, 8)], [0, 2, 4, 8, 12, 16]),
    ([Stretch(0, 2, 8), Stretch(2, 4, 8), Stretch(4, 1, 8)], [0, 2, 4, 8, 12, 13]),
    ([Stretch(0, 3, 8), Stretch(2, 1, 16)], [0, 1, 3, 4, 5, 6]),  # in rows of 16
  ],
)
def test_rows_seen(stretches: Sequence[Stretch], seen: list[int]) -> None:
  assert [rows_seen(stretches, step) for step in range(6)] == seen


def test_a_life_that_was_taken_back_leaves_no_stretch() -> None:
  before = [Stretch(0, 2, 8), Stretch(40, 4, 8), Stretch(60, 8, 8)]
  assert continued(before, Stretch(50, 4, 8)) == tuple(before[:2])
  assert continued(before, Stretch(40, 2, 8)) == tuple(before[:1])
  assert continued(before, Stretch(40, 1, 8)) == (before[0], Stretch(40, 1, 8))
  assert continued([], Stretch(0, 2, 8)) == (Stretch(0, 2, 8),)


def test_batches_of_other_sizes_follow_without_a_seam(folder: Path) -> None:
  order = [open_text(folder, batch_size=1).batch(i).tokens[0] for i in range(40)]
  stretches: tuple[Stretch, ...] = ()
  seen, first_step = [], 0
  for batch_size, steps in ((2, 4), (5, 3), (1, 2), (3, 2)):
    data = open_text(folder, batch_size=batch_size)
    stretches = continued(stretches, data.stretches[0]._replace(first_step=first_step))
    data = dataclasses.replace(data, stretches=stretches)
    for step in range(first_step, first_step + steps):
      seen += [*data.batch(step).tokens]
    assert np.array_equal(data.batch(step, rows=[batch_size - 1]).tokens[0], seen[-1])
    first_step += steps
  assert len(seen) == 31 and all(np.array_equal(a, b) for a, b in zip(seen, order))
