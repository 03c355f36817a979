"""Files that are whole or not there, staged directories, and files that are not trusted."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.runtime.files import (
  expect_room,
  inside,
  parse_json_object,
  read_json,
  staged,
  whole_file,
  whole_path,
  write_whole,
)


def names(directory: Path) -> list[str]:
  return sorted(path.name for path in directory.iterdir())


# ---- whole files


@pytest.mark.parametrize('content', ['text: é 火\n', b'\x00\xff', '', b''])
def test_text_and_bytes_are_written_as_they_are(tmp_path: Path, content: str | bytes) -> None:
  write_whole(tmp_path / 'a', content)
  wanted = content.encode() if isinstance(content, str) else content
  assert (tmp_path / 'a').read_bytes() == wanted and names(tmp_path) == ['a']
  write_whole(tmp_path / 'a', b'new')
  assert (tmp_path / 'a').read_bytes() == b'new' and names(tmp_path) == ['a']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize('writer', [whole_path, whole_file])
def test_an_error_in_the_block_leaves_the_old_file_and_no_temporary_one(
  tmp_path: Path, writer: Callable, error: type[BaseException]
) -> None:
  (tmp_path / 'a').write_text('old')
  with pytest.raises(error), writer(tmp_path / 'a') as file:
    if writer is whole_path:
      file.write_text('half')
    else:
      file.write(b'half')
    assert len(names(tmp_path)) == 2
    raise error
  assert (tmp_path / 'a').read_text() == 'old' and names(tmp_path) == ['a']


def test_an_error_with_no_file_before_leaves_nothing(tmp_path: Path) -> None:
  with contextlib.suppress(RuntimeError), whole_file(tmp_path / 'a') as file:
    file.write(b'half')
    raise RuntimeError
  assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
  (tmp_path / 'a').write_text('old')
  code = (
    'import os, pathlib, signal, sys; from moejax.runtime.files import whole_file\n'
    'with whole_file(pathlib.Path(sys.argv[1])) as file:\n'
    '  file.write(b"half"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)'
  )
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'a')])
  assert done.returncode == -9 and (tmp_path / 'a').read_text() == 'old'


def test_a_reader_in_between_sees_the_old_file(tmp_path: Path) -> None:
  (tmp_path / 'a').write_text('old')
  with whole_file(tmp_path / 'a') as file:
    file.write(b'new')
    file.flush()
    assert (tmp_path / 'a').read_text() == 'old'
  assert (tmp_path / 'a').read_text() == 'new'


def test_a_link_is_replaced_and_its_target_not_touched(tmp_path: Path) -> None:
  (tmp_path / 'target').write_text('mine')
  (tmp_path / 'a').symlink_to(tmp_path / 'target')
  (tmp_path / 'b').symlink_to(tmp_path / 'nowhere')
  for name in 'ab':
    write_whole(tmp_path / name, 'new')
    assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == 'new'
  assert (tmp_path / 'target').read_text() == 'mine' and not (tmp_path / 'nowhere').exists()


def test_the_content_is_synced_before_the_rename(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  events = []
  fsync, replace = os.fsync, Path.replace

  def logged_fsync(descriptor: int) -> None:
    events.append(('sync', os.fstat(descriptor).st_size))
    fsync(descriptor)

  def logged_replace(path: Path, target: Path) -> Path:
    events.append(('rename', target.name))
    return replace(path, target)

  monkeypatch.setattr(os, 'fsync', logged_fsync)
  monkeypatch.setattr(Path, 'replace', logged_replace)
  write_whole(tmp_path / 'a', b'x' * 1000)
  assert events == [('sync', 1000), ('rename', 'a')], 'all bytes, and then the name'


def test_two_writers_of_one_file_do_each_other_no_harm(tmp_path: Path) -> None:
  with whole_file(tmp_path / 'a') as one:
    one.write(b'one')
    with whole_file(tmp_path / 'a') as other:
      other.write(b'other')
    assert (tmp_path / 'a').read_bytes() == b'other'
  assert (tmp_path / 'a').read_bytes() == b'one' and names(tmp_path) == ['a']


# ---- staged directories


def test_a_staged_directory_appears_when_the_block_ends_well(tmp_path: Path) -> None:
  with staged(tmp_path / 'deep' / 'out') as partial:
    (partial / 'x').write_text('1')
    assert not (tmp_path / 'deep' / 'out').exists()
  assert names(tmp_path / 'deep') == ['out'] and names(tmp_path / 'deep' / 'out') == ['x']


def test_a_block_that_fails_leaves_no_directory(tmp_path: Path) -> None:
  with pytest.raises(KeyboardInterrupt), staged(tmp_path / 'out') as partial:
    (partial / 'x').write_text('1')
    raise KeyboardInterrupt
  assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_and_its_links_not_followed(tmp_path: Path) -> None:
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'kept').write_text('1')
  partial = tmp_path / 'out.moejax-partial'
  (partial / 'sub').mkdir(parents=True)
  (partial / 'sub' / 'half').write_text('1')
  (partial / 'link').symlink_to(tmp_path / 'mine')
  with staged(tmp_path / 'out') as directory:
    assert names(directory) == []
  assert names(tmp_path / 'out') == [] and names(tmp_path / 'mine') == ['kept']


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
  (tmp_path / 'out').mkdir()
  expect_room(tmp_path / 'out')
  (tmp_path / 'out' / 'x').write_text('mine')
  (tmp_path / 'file').write_text('mine')
  for name in ('out', 'file'):
    with pytest.raises(ConfigError, match='is there and not empty'), staged(tmp_path / name):
      raise AssertionError('the block must not run')


def test_two_at_once_are_refused(tmp_path: Path) -> None:
  with staged(tmp_path / 'out') as partial:
    (partial / 'x').write_text('1')
    with pytest.raises(ConfigError, match='being written by another process'):
      with staged(tmp_path / 'out'):
        raise AssertionError('the block must not run')
  assert names(tmp_path / 'out') == ['x']


# ---- files that are not trusted


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', 'sub/../../x', 'link', 'sub/link'])
def test_names_that_lead_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
  home = tmp_path / 'home'
  (home / 'sub').mkdir(parents=True)
  (home / 'link').symlink_to(tmp_path / 'x')
  (home / 'sub' / 'link').symlink_to('../../x')
  with pytest.raises(ConfigError, match='expected files inside it only'):
    inside(home, name)
  with pytest.raises(ConfigError, match='copy the file there'):
    read_json(home, name)


def test_names_inside_are_paths_and_links_inside_are_followed(tmp_path: Path) -> None:
  (tmp_path / 'link').symlink_to('a')
  for name in ('a', 'sub/b', 'link', 'sub/../a'):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_snapshot_of_a_cache_may_link_to_its_blobs_only(tmp_path: Path) -> None:
  snapshot = tmp_path / 'snapshots' / 'abc'
  snapshot.mkdir(parents=True)
  (tmp_path / 'blobs').mkdir()
  (tmp_path / 'blobs' / '1').write_text('{"a": 1}')
  (snapshot / 'config.json').symlink_to('../../blobs/1')
  assert read_json(snapshot, 'config.json') == {'a': 1}
  (snapshot / 'other').symlink_to('../../refs')
  with pytest.raises(ConfigError, match='inside it only'):
    inside(snapshot, 'other')


def test_json_of_an_absent_file_is_empty(tmp_path: Path) -> None:
  assert read_json(tmp_path, 'none.json') == {}
  (tmp_path / 'a.json').write_text('{"b": {"c": [1]}}')
  assert read_json(tmp_path, 'a.json') == {'b': {'c': [1]}}


@pytest.mark.parametrize(
  ('raw', 'told'),
  [
    (b'[1]', 'expected a JSON object, found list'),
    (b'{"a": 1', 'expected JSON, found JSONDecodeError'),
    (b'\xff', 'expected JSON, found UnicodeDecodeError'),
    (b'[' * 100_000, 'expected JSON, found RecursionError'),
    (b'{"a": {"b": 1, "b": 2}}', "expected every name once, found duplicated 'b'"),
    (b'{"a\\u001b[2J": 1}', 'expected names that can be printed'),
  ],
)
def test_json_that_cannot_be_used_is_told(raw: bytes, told: str) -> None:
  with pytest.raises(ConfigError) as error:
    parse_json_object(Path('where.json'), raw)
  assert str(error.value).startswith(f'where.json: {told}') and 'again' in str(error.value)


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
  """Of this path alone, whatever characters are in its name; another writer may be at work."""
  old, young = tmp_path / 'a[1].json.0a.tmp', tmp_path / 'a[1].json.0b.tmp'
  other = tmp_path / 'b.json.0c.tmp'
  for path in (old, young, other):
    path.write_text('half of it')
  for path in (old, other):
    os.utime(path, (0, 0))
  write_whole(tmp_path / 'a[1].json', 'all of it')
  assert sorted(tmp_path.iterdir()) == sorted([tmp_path / 'a[1].json', young, other])
