"""What a run directory tells of the batches before, and what is believed of it."""

import json
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data.position import Stretch
from moejax.runtime import multiprocess
from moejax.train.text_position import (
  agreed_stretches,
  position_lines,
  read_stretches,
  stretches_after,
  write_stretches,
)

TWO, FOUR, LONG = Stretch(0, 2, 8), Stretch(40, 4, 8), Stretch(50, 4, 16)
SAVED_TWO, SAVED_FOUR = ({'batch_size': size, 'seq_len': '8'} for size in '24')


def test_stretches_are_read_as_written(tmp_path: Path) -> None:
  assert read_stretches(tmp_path) == []
  write_stretches(tmp_path, (TWO, FOUR))
  assert read_stretches(tmp_path) == [TWO, FOUR]
  not_counts = [
    json.dumps({'stretches': [TWO._replace(batch_size=value)._asdict()]})
    for value in ('2', -1, 1.5, None, True)
  ]
  others = ('{"stretches": 7}', '{"other": []}', '{"stretches": [{"step": 0}]}', 'x')
  for content in (*others, *not_counts):
    (tmp_path / 'batches.json').write_text(content)
    with pytest.raises(ConfigError, match=r'batches\.json'):
      read_stretches(tmp_path)


def test_what_one_process_cannot_read_stops_all(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  write_stretches(tmp_path, (TWO, FOUR))
  assert agreed_stretches(tmp_path) == [TWO, FOUR]
  # What another process, the second, tells of itself: of its reading, and then of what it read.
  for told, words in (([1], 'process 1 failed'), ([0, 7], 'of process 1 is not that of process 0')):
    answers = iter(told)
    monkeypatch.setattr(multiprocess, 'gather_ints', lambda mine, of=answers: [mine, next(of)])
    with pytest.raises(ConfigError, match=words):
      agreed_stretches(tmp_path)


def test_a_run_goes_on_from_what_its_checkpoint_had() -> None:
  assert stretches_after([TWO], SAVED_TWO, FOUR) == (TWO, FOUR)
  assert stretches_after([TWO, FOUR], SAVED_FOUR, FOUR._replace(first_step=44)) == (TWO, FOUR)
  assert stretches_after([TWO, FOUR], SAVED_FOUR, LONG) == (TWO, FOUR, LONG)
  # Started with another batch and ended before it saved: the checkpoint is of the one before.
  assert stretches_after([TWO, FOUR], SAVED_TWO, FOUR._replace(batch_size=8)) == (
    TWO,
    FOUR._replace(batch_size=8),
  )
  # A directory of before there was such a file, and one that tells of another run.
  assert stretches_after([], SAVED_TWO, FOUR) == (TWO, FOUR)
  assert stretches_after([Stretch(0, 7, 8)], SAVED_TWO, FOUR) == (TWO, FOUR)


def test_the_place_is_told_where_batches_change() -> None:
  assert position_lines((TWO,), 40) == [] == position_lines((TWO, FOUR), 44)
  assert position_lines((TWO, FOUR), 40) == ['the text goes on after the 80 rows that were seen']
  (rows, order) = position_lines((TWO, FOUR, LONG), 50)
  assert '60 rows' in rows and 'rows of 16 tokens have another order than those of 8' in order
