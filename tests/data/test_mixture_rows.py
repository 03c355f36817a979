"""Training on a mixture: a row is of its task, as often as its weight says."""

import itertools
import math
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data.holdout import digest_of
from moejax.data.pipeline import open_data
from moejax.data.rows import Rows
from moejax.data.sources import DataConfig
from tests.data.mixed_texts import (
  EOD,
  LETTERS,
  B,
  S,
  equal,
  open_mixture,
  rows_of,
)


def test_a_plain_source_is_the_pipeline_without_a_mixture(mixed_folder: Path) -> None:
  config = DataConfig(
    source='text',
    path=f'{mixed_folder}/code/*',
    tokenizer='bytes',
    cache_dir=f'{mixed_folder}/cache',
  )
  data = open_data(config, batch_size=B, seq_len=S, seed=3)
  streams = [
    np.frombuffer(path.read_bytes()[:-32], np.uint16)
    for path in (mixed_folder / 'cache').glob('tokens-*')
  ]
  order = int(digest_of('order', 3)[:8], 16)
  rows = (
    grain.MapDataset.source(Rows(max(streams, key=len), S)).shuffle(seed=order).repeat().batch(B)
  )
  for step in (0, 1, 500):
    assert (
      np.array_equal(data.batch(step).tokens, rows[step][:, :-1])
      and not data.batch(step).task_ids.any()
    )
  assert (
    data.fingerprint['first_batch'] == digest_of(rows[0].tobytes()) and len(data.fingerprint) == 11
  )
  assert data.tasks == config.tasks == ('text',) and 'mixture' not in data.fingerprint


def test_a_mixture_of_one_is_its_source(mixed_folder: Path) -> None:
  config = DataConfig(
    source='text',
    path=f'{mixed_folder}/code/*',
    tokenizer='bpe:300',
    cache_dir=f'{mixed_folder}/cache',
  )
  plain = open_data(config, batch_size=B, seq_len=S, seed=0)
  mixed = open_mixture(mixed_folder, {'code': 0.3}, tokenizer='bpe:300')
  assert all(equal(plain.batch(step), mixed.batch(step)) for step in (0, 1, 40, 10**9))
  assert all(equal(a, b) for a, b in zip(plain.validation(), mixed.validation(), strict=True))
  assert all(equal(a, b) for a, b in zip(plain.validation(2), mixed.validation(2), strict=True))
  assert (
    plain.sizes == mixed.sizes
    and plain.bytes_per_token == mixed.bytes_per_token == plain.sizes[0].bytes_per_token
  )
  assert mixed.fingerprint == plain.fingerprint | {'source': 'mixture', 'mixture': 'code=1.0'}
  assert (
    # A file each for tokenizer and streams, and the note that it is whole.
    mixed.tasks == ('code',) and len(list((mixed_folder / 'cache').iterdir())) == 3 * 2
  )  # they share a cache


@pytest.mark.parametrize(
  'weights',
  [
    {'code': 1, 'maths': 1},
    {'code': 0.7, 'maths': 0.2, 'notes': 0.1},
    {'code': 1e-3, 'notes': 0.9, 'maths': 0.5},
    {'code': 3, 'maths': 1 / 3, 'notes': math.pi},
  ],
)
def test_rows_are_drawn_as_the_weights_say(mixed_folder: Path, weights: dict[str, float]) -> None:
  data, steps = open_mixture(mixed_folder, weights), 300
  tasks = np.array([data.batch(step).task_ids for step in range(steps)])  # [steps, B]
  total = sum(weights.values())
  for i, task in enumerate(data.tasks):
    share = weights[task] / total
    for first in (0, 170):  # over any stretch, not in the end only
      counted = (tasks[first:] == i).sum()
      assert abs(counted - share * tasks[first:].size) <= 2 + 0.01 * share * tasks[first:].size
  assert data.tasks == tuple(sorted(weights)) and tasks.dtype == np.int32


def test_a_row_is_of_the_text_its_task_id_says(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder)
  assert data.tasks == ('code', 'maths', 'notes')
  seen = Counter()
  for task, ids in rows_of([data.batch(step) for step in range(200)] + list(data.validation())):
    text = bytes(i for i in ids if i != EOD).decode(errors='ignore')
    assert set(text) <= {*LETTERS[data.tasks[task]], '\n'} and text.strip()
    seen[task] += 1
  assert len(seen) == 3


def test_a_batch_is_a_function_of_seed_and_step(mixed_folder: Path) -> None:
  data, steps = open_mixture(mixed_folder), [0, 1, 2, 63, 10**9]
  forwards = {step: data.batch(step) for step in steps}
  again = open_mixture(mixed_folder)
  assert all(
    equal(again.batch(step), forwards[step]) for step in reversed(steps)
  )  # resume anywhere, in any order
  assert again.fingerprint == data.fingerprint
  other = open_mixture(mixed_folder, seed=1)
  assert not np.array_equal(other.batch(0).tokens, forwards[0].tokens)
  assert np.array_equal(
    other.batch(0).task_ids, forwards[0].task_ids
  )  # weights are kept to in any seed
  assert [x.shape for x in forwards[0]] == [(B, S)] * 5 + [(B,)]


def test_each_task_goes_round_its_own_rows_without_end(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder, {'code': 5, 'maths': 3, 'notes': 5})
  drawn = rows_of(data.batch(step) for step in range(300))
  rounds = []
  for task in range(3):
    rows = [ids for of, ids in drawn if of == task]
    n = data.sizes[task].train_tokens // S
    epochs = [rows[i : i + n] for i in range(0, len(rows) - n, n)]
    assert epochs and all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    rounds.append(len(epochs))
  assert max(rounds) > 2 * min(rounds), 'the shortest must not end the mixture'


def test_tasks_of_as_many_rows_are_not_shuffled_alike(tmp_path: Path) -> None:
  for task, first in (('a', 100), ('b', 500)):
    (tmp_path / task).mkdir()
    for i in range(200):
      (tmp_path / task / f'{i:03}.txt').write_text(f'{first + i:03}')
  data = open_mixture(tmp_path, {'a': 1, 'b': 1}, batch_size=2, seq_len=4)
  sizes = {size.train_tokens for size in data.sizes}
  first = [
    [ids for of, ids in rows_of(data.batch(step) for step in range(20)) if of == task]
    for task in range(2)
  ]
  position = [[int(bytes(i for i in ids if i != EOD)) % 100 for ids in rows] for rows in first]
  assert len(sizes) == 1 and len({abs(a - b) for a, b in zip(*position)}) > 5


def test_a_batch_is_not_longer_than_a_round(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder)
  assert all(size.train_tokens // S >= B for size in data.sizes)
  with pytest.raises(ConfigError, match='batch_size=9999 draws 5000 of them'):
    open_mixture(mixed_folder, batch_size=9999)
