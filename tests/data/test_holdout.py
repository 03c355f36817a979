"""No text that validates trains: not within a text, and not across the tasks of a mixture."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data import token_stream
from tests.data.mixed_texts import EOD, equal, open_mixture, rows_of
from tests.data.plain_texts import ids_of, open_text, split_by_hand


def test_held_out_documents_are_whole_and_apart(folder: Path) -> None:
  for i in range(60, 90):  # copies
    shutil.copy(folder / 'text' / f'{i - 60:02}.txt', folder / 'text' / f'{i}.txt')
  data = open_text(folder)
  train, held_out = split_by_hand(folder, data)
  assert (
    data.train_text() == ''.join(train).encode()
    and data.validation_text() == ''.join(held_out).encode()
  )
  assert (data.train_bytes, data.validation_bytes) == (
    len(data.train_text()),
    len(data.validation_text()),
  )
  assert len(train) + len(held_out) == 90 and not set(train) & set(held_out)
  assert 0.04 < data.validation_bytes / (data.train_bytes + data.validation_bytes) < 0.15
  assert data.bytes_per_token == data.train_bytes / (len(ids_of(train)) - 1)


def test_where_the_text_lies_does_not_matter(
  folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  other = tmp_path_factory.mktemp('other')
  os.rename(folder / 'text', other / 'text')
  moved = open_text(other).fingerprint
  os.rename(other / 'text', folder / 'text')
  assert open_text(folder).fingerprint == moved


@pytest.mark.parametrize('line, ending', [('one line of many\n', '\n'), ('no line end at all', '')])
def test_the_end_of_a_lone_document_is_held_out(folder: Path, line: str, ending: str) -> None:
  whole = line * 400
  (folder / 'one.md').write_text(whole)
  data = open_text(folder, path=f'{folder}/one.md')
  assert data.train_text() + data.validation_text() == whole.encode()
  assert data.train_text().endswith(ending.encode())
  assert 0.05 <= data.validation_bytes / len(whole) < 0.06


def test_empty_documents_are_passed_over(folder: Path) -> None:
  before = open_text(folder)
  (folder / 'text' / '00a.txt').touch()
  assert equal(before.batch(0), open_text(folder).batch(0))


def documents_of(mixed_folder: Path, task: str) -> list[str]:
  return [path.read_text(encoding='utf-8') for path in sorted((mixed_folder / task).iterdir())]


def copy_notes_into_code(mixed_folder: Path) -> None:
  for path in sorted((mixed_folder / 'notes').iterdir()):
    (mixed_folder / 'code' / f'copy{path.name}').write_bytes(path.read_bytes())


def test_a_document_of_two_tasks_is_on_one_side_in_both(mixed_folder: Path) -> None:
  copy_notes_into_code(mixed_folder)
  data = open_mixture(mixed_folder)
  train, held = (
    text.decode().splitlines(True) for text in (data.train_text(), data.validation_text())
  )
  documents = [text for task in data.tasks for text in documents_of(mixed_folder, task)]
  assert not set(train) & set(held) and Counter(train + held) == Counter(documents)
  assert {held.count(text) for text in documents_of(mixed_folder, 'notes')} == {
    0,
    2,
  }  # held out of both, if of one
  assert data.train_bytes + data.validation_bytes == len(''.join(documents).encode())
  assert [of.train_bytes + of.validation_bytes for of in data.sizes] == [
    len(''.join(documents_of(mixed_folder, task)).encode()) for task in data.tasks
  ]
  rows = {
    bytes(row) for _, row in rows_of(data.batch(step) for step in range(150)) if EOD not in row
  }
  train_text, held_text = data.train_text(), data.validation_text()
  assert len(rows) > 50 and all(row in train_text and row not in held_text for row in rows)


def test_what_others_hold_out_leaves_no_trace_in_the_cache(
  mixed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  copy_notes_into_code(mixed_folder)
  alone = open_mixture(mixed_folder, {'code': 1})
  mixed = open_mixture(mixed_folder, {'code': 1, 'notes': 1})
  again = open_mixture(mixed_folder, {'code': 1})
  assert alone.fingerprint == again.fingerprint and alone.sizes == again.sizes
  assert mixed.sizes[0].validation_bytes > alone.sizes[0].validation_bytes
  assert mixed.sizes[0].validation_tokens > alone.sizes[0].validation_tokens
  fresh = open_mixture(mixed_folder, {'code': 1, 'notes': 1}, cache_dir=f'{mixed_folder}/fresh')
  assert fresh.fingerprint == mixed.fingerprint


def test_the_only_document_of_a_task_is_in_no_other(mixed_folder: Path) -> None:
  (mixed_folder / 'one').mkdir()
  text = 'line of one\n' * 90
  (mixed_folder / 'one' / 'x.txt').write_text(text)
  data = open_mixture(mixed_folder, {'code': 1, 'one': 1})
  assert (
    data.train_text().count(b'line of one') + data.validation_text().count(b'line of one') == 90
  )
  (mixed_folder / 'code' / 'x.txt').write_text(text)
  with pytest.raises(
    ConfigError, match='mixture.code: holds the only document of mixture.one.* leave it out of one'
  ):
    open_mixture(mixed_folder, {'code': 1, 'one': 1})
  (mixed_folder / 'code' / 'x.txt').write_text(f'{text}one line more, of which one knows nothing')
  with pytest.raises(ConfigError, match='mixture.code: holds .* of mixture.one, or a near-copy'):
    open_mixture(mixed_folder, {'code': 1, 'one': 1})
  (mixed_folder / 'one' / 'x.txt').write_text(text)
  (mixed_folder / 'two').mkdir()
  (mixed_folder / 'two' / 'x.txt').write_text(text)
  assert (
    open_mixture(mixed_folder, {'two': 1, 'one': 1}).sizes[0] == data.sizes[1]
  )  # cut in one place in both
