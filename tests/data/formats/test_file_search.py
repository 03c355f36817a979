"""Which files a path names: globs, folders, datasets; each once; nothing without end."""

import json
import os
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data import formats


def files_of_path(path: str) -> list[str]:
  return formats.files_of_path(path, formats.suffix_of, formats.READABLE)


def write(folder: Path, *names: str) -> None:
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(name)


def names_of(folder: Path, path: str) -> list[str]:
  return [os.path.relpath(found, folder) for found in files_of_path(path)]


def test_a_folder_is_all_that_can_be_read_in_it(tmp_path: Path) -> None:
  write(tmp_path, 'b.txt', 'a/c.jsonl.gz', 'a/d/e.parquet', 'f.json.zst')
  write(tmp_path, 'x.png', '.git/y.txt', 'a/.hidden.md', 'z.parquet.gz', 'plain')
  found = ['a/c.jsonl.gz', 'a/d/e.parquet', 'b.txt', 'f.json.zst']
  assert names_of(tmp_path, f'{tmp_path}') == found == names_of(tmp_path, f'{tmp_path}/')
  assert names_of(tmp_path, f'{tmp_path}/a, {tmp_path}/b*') == found[:3]
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match=r'empty.* matches no file that can be read, of \.txt \.md'):
    files_of_path(f'{tmp_path}/empty')


def test_a_saved_dataset_is_the_files_that_its_state_names(tmp_path: Path) -> None:
  write(tmp_path, 'd/train/data-0.arrow', 'd/train/data-1.arrow', 'd/train/cache-7.arrow')
  write(tmp_path, 'd/train/dataset_info.json', 'd/dataset_dict.json')
  state = tmp_path / 'd/train/state.json'
  state.write_text(json.dumps({'_data_files': [{'filename': f'data-{i}.arrow'} for i in (0, 1)]}))
  found = ['d/train/data-0.arrow', 'd/train/data-1.arrow']
  assert names_of(tmp_path, f'{tmp_path}/d/train') == found
  with pytest.raises(ConfigError, match='d.* holds the splits train: give the folder of one'):
    files_of_path(f'{tmp_path}/d')
  state.write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
  with pytest.raises(ConfigError, match='secret'):
    files_of_path(f'{tmp_path}/d/train')
  state.write_text('{}')
  with pytest.raises(ConfigError, match='names no files'):
    files_of_path(f'{tmp_path}/d/train')


def test_a_file_is_read_once_and_its_links_are_told(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  write(tmp_path, 'a.txt', 'd/e.txt')
  (tmp_path / 'b.txt').symlink_to('a.txt')
  os.link(tmp_path / 'a.txt', tmp_path / 'c.txt')
  (tmp_path / 'd/up').symlink_to(tmp_path)  # a circle
  assert names_of(tmp_path, f'{tmp_path}') == ['a.txt', 'd/e.txt']
  assert '2 links to files that are read already: ' in caplog.text
  assert f'{tmp_path}/b.txt is {tmp_path}/a.txt' in caplog.text
  assert names_of(tmp_path, f'{tmp_path}/b.txt') == ['b.txt']  # a link alone is a file
  (tmp_path / 'b.txt').unlink()
  (tmp_path / 'b.txt').symlink_to('nowhere')
  with pytest.raises(ConfigError, match=r'No such file.*b\.txt'):
    files_of_path(f'{tmp_path}/*.txt')


def test_what_may_have_no_end_is_refused(tmp_path: Path) -> None:
  os.mkfifo(tmp_path / 'pipe.txt')
  (tmp_path / 'zero.txt').symlink_to('/dev/zero')
  for path, words in (
    (tmp_path / 'pipe.txt', r'pipe\.txt is a FIFO and not a file; leave it out'),
    (tmp_path / 'zero.txt', r'zero\.txt is a device'),
    (tmp_path, 'is a FIFO'),
  ):
    with pytest.raises(ConfigError, match=words):
      files_of_path(f'{path}')
