"""Rows of a stream, and the batch that they make, against plain loops."""

from collections import Counter
from pathlib import Path

import numpy as np

from moejax.data.batch import IGNORE
from moejax.data.rows import Rows, batch_from_rows, spaced_batches
from tests.data.plain_texts import open_text


def test_rows_have_a_target_for_each_input() -> None:
  for n in range(40):
    rows = [Rows(np.arange(n), 8)[i] for i in range(len(Rows(np.arange(n), 8)))]
    assert [row.tolist() for row in rows] == [[*range(i, i + 9)] for i in range(0, n - 8, 8)]


def by_hand(tokens: list[int], eod: int) -> tuple[list[int], list[int]]:
  segments, positions = [], []
  for i, token in enumerate(tokens):
    new = i > 0 and token == eod
    segments.append(1 if i == 0 else segments[-1] + new)
    positions.append(0 if i == 0 or new else positions[-1] + 1)
  return segments, positions


def test_segments_positions_and_targets_against_a_plain_loop(folder: Path) -> None:
  for i in range(60, 99):
    (folder / 'text' / f'{i}.txt').write_text(str(i) * (i % 3 + 1))
  data = open_text(folder, seq_len=6)
  batches = [data.batch(step) for step in range(500)] + list(data.validation())
  starts = Counter()
  for batch in batches:
    for tokens, targets, mask, segments, positions in zip(*batch[:5]):
      n = int(mask.sum())
      assert mask[:n].all() and np.array_equal(tokens[1:n], targets[: max(n - 1, 0)])
      assert (segments[:n].tolist(), positions[:n].tolist()) == by_hand(tokens[:n].tolist(), 256)
      assert not segments[n:].any() and not positions[n:].any() and (targets[n:] == IGNORE).all()
      starts[n > 0 and tokens[0] == 256, n > 0 and segments[n - 1] > 1] += 1
  assert len(starts) == 4, 'the text is to have rows of each kind'


def test_rows_past_the_end_of_a_stream_are_padding() -> None:
  rows = np.array([[7, 1, 9, 2, -1], [-1, -1, -1, -1, -1]], np.int32)
  batch = batch_from_rows(rows, np.array([1, 0], np.int32), eod_id=9)
  assert batch.tokens.tolist() == [[7, 1, 9, 9], [9, 9, 9, 9]]
  assert batch.targets.tolist() == [[1, 9, 2, IGNORE], [IGNORE] * 4]
  assert batch.segment_ids.tolist() == [[1, 1, 2, 0], [0, 0, 0, 0]]
  assert batch.positions.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
  assert batch.mask.tolist() == [[True, True, True, False], [False] * 4]
  assert batch.task_ids.tolist() == [1, 0]


def test_batches_that_are_wanted_are_spread_and_the_first_ones_are_among_them() -> None:
  assert [*spaced_batches(10, 0, 0)] == [*spaced_batches(10, 99, 0)] == [*range(10)]
  assert [*spaced_batches(10, 5, 0)] == [0, 2, 4, 6, 8]
  assert [*spaced_batches(10, 4, 2)] == [0, 1, 2, 6]
  for total in range(1, 12):
    for wanted in range(total + 3):
      for last_opening in range(total):
        batches = [*spaced_batches(total, wanted, last_opening)]
        assert len(batches) == (min(wanted, total) or total)
        assert batches == sorted({*batches}) and batches[-1] < total
        assert batches[: last_opening + 1] == [*range(min(last_opening + 1, len(batches)))]
