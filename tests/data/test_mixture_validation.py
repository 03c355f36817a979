"""Validating on a mixture: every held-out token of every task once, and every task early."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from moejax.data.batch import Batch
from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig
from tests.data.mixed_texts import EOD, LETTERS, B, S, equal, open_mixture, open_task_alone


def targets_by_task(batches: Iterable[Batch]) -> dict[int, list[int]]:
  """Task -> its rows' targets, one row after another."""
  found = {task: [] for task in range(3)}
  for batch in batches:
    for targets, mask, task in zip(batch.targets, batch.mask, batch.task_ids):
      found[int(task)] += targets[mask].tolist()
  return found


def test_validation_predicts_every_held_out_token_of_every_task_once(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder)
  batches = list(data.validation())
  streams = targets_by_task(batches)
  for i, task in enumerate(data.tasks):
    plain = open_task_alone(mixed_folder, task)
    expected = np.concatenate([b.targets[b.mask] for b in plain.validation()]).tolist()
    assert streams[i] == expected and len(expected) == data.sizes[i].validation_tokens
  assert sum(int(b.mask.sum()) for b in batches) == data.validation_tokens
  assert all(b.mask.any(1).all() for b in batches[:-1]) and all(
    b.tokens.shape == (B, S) for b in batches
  )
  for batch in batches:  # -1 and the ids of other rows do not leak into padding
    assert (batch.segment_ids[~batch.mask] == 0).all() and (batch.tokens[~batch.mask] == EOD).all()


@pytest.mark.parametrize('max_batches', [0, 5])
def test_every_target_is_of_its_document(mixed_folder: Path, max_batches: int) -> None:
  """Documents span rows, rows span documents; batches hold rows of several tasks."""
  data = open_mixture(mixed_folder)
  texts = data.validation_text().decode().splitlines(True)
  assert [len(text.encode()) for text in texts] == data.documents.num_bytes.tolist()
  letters = [next(i for i, task in enumerate(data.tasks) if t[0] in LETTERS[task]) for t in texts]
  assert letters == data.documents.tasks.tolist()
  found = [bytearray() for _ in texts]
  pairs = zip(data.validation(max_batches), data.validation_documents(max_batches), strict=True)
  for batch, documents in pairs:
    assert np.array_equal(documents >= 0, batch.mask)
    for targets, of_row, task in zip(batch.targets, documents, batch.task_ids):
      for target, document in zip(targets[of_row >= 0], of_row[of_row >= 0]):
        assert data.documents.tasks[document] == task
        if target != EOD:
          found[document].append(target)
  if not max_batches:
    assert [part.decode() for part in found] == texts
  for part, text in zip(found, texts):
    rest = iter(text.encode())
    assert all(byte in rest for byte in part)  # in the text's order, perhaps with gaps
  assert 0 < sum(map(len, found)) <= data.validation_bytes


@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_some_of_the_validation_has_every_task(mixed_folder: Path, batch_size: int) -> None:
  data = open_mixture(
    mixed_folder, {'code': 5, 'maths': 3, 'notes': 2}, batch_size=batch_size, seq_len=9
  )
  every = list(data.validation())
  for wanted in range(1, len(every) + 3):
    some = list(data.validation(wanted))
    found = [next(i for i, b in enumerate(every) if equal(a, b)) for a in some]
    assert len(found) == len(set(found)) == min(wanted, len(every)) and found == sorted(found)
    assert len({int(task) for b in some for task in b.task_ids}) >= min(3, wanted * batch_size)
    if wanted > 3:
      assert found[-1] >= len(every) * (wanted - 2) / wanted - 1  # spread over all of it
  halves = [
    Counter(t for b in half for t in b.task_ids.tolist())
    for half in (every[: len(every) // 2], every[len(every) // 2 :])
  ]
  assert all(
    abs(halves[0][task] - halves[1][task]) <= 0.2 * halves[0][task] + batch_size + 1
    for task in range(3)
  )


def test_one_batch_has_a_task_of_little_text_too(mixed_folder: Path) -> None:
  (mixed_folder / 'tiny').mkdir()
  (mixed_folder / 'tiny' / 'x.txt').write_text('x' * 300)
  data = open_mixture(mixed_folder, {'code': 9, 'tiny': 1}, batch_size=2, seq_len=9)
  assert data.sizes[0].validation_tokens > 9 * data.sizes[1].validation_tokens
  assert [batch.task_ids.tolist() for batch in data.validation(1)] == [[0, 1]]


def test_sizes_are_of_each_task_and_add_up(mixed_folder: Path) -> None:
  data = open_mixture(mixed_folder, {'code': 1, 'maths': 0.5, 'notes': 0.5}, tokenizer='bpe:300')
  for i, task in enumerate(data.tasks):
    of = data.sizes[i]
    total = sum(len(path.read_bytes()) for path in (mixed_folder / task).iterdir())
    assert (
      of.train_bytes + of.validation_bytes == total and 0.04 < of.validation_bytes / total < 0.15
    )
    assert of[:4] == tuple(
      getattr(open_task_by_tokenizer_of(mixed_folder, data, task), name) for name in of._fields[:4]
    )
  for name in data.sizes[0]._fields[:4]:
    assert getattr(data, name) == sum(getattr(of, name) for of in data.sizes)
  mixed = (0.5, 0.25, 0.25) @ np.array([of.bytes_per_token for of in data.sizes])
  assert (
    data.bytes_per_token == pytest.approx(mixed)
    and len({of.bytes_per_token for of in data.sizes}) == 3
  )
  texts = data.train_text(), data.validation_text()
  assert [len(text) for text in texts] == [data.train_bytes, data.validation_bytes]
  ids = np.concatenate(
    [data.batch(step).targets.ravel() for step in range(400)]
  )  # as they really are drawn
  lengths = [
    0 if i == data.tokenizer.eod_id else len(data.tokenizer._backend.id_to_token(i))
    for i in range(300)
  ]
  assert data.bytes_per_token == pytest.approx(np.array(lengths)[ids].mean(), rel=2e-3)


def open_task_by_tokenizer_of(mixed_folder: Path, data: Data, task: str) -> Data:
  data.tokenizer.save(mixed_folder / 'mixed.json')
  config = DataConfig(
    source='text',
    path=f'{mixed_folder}/{task}/*',
    tokenizer=f'{mixed_folder}/mixed.json',
    cache_dir=f'{mixed_folder}/one',
  )
  return open_data(config, batch_size=1, seq_len=S, seed=0)
