"""Writing a directory of tensors: it is whole or not there."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import Spec
from tests.hf.safetensors.tensor_files import noise, specs, write

ROOT = Path(__file__).parents[3]


def fails(error: Exception) -> np.ndarray:
  raise error


def test_a_full_directory_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
  (tmp_path / 'm').mkdir()
  write(tmp_path / 'm', {'a': noise((2,), 'U8')})
  for target in (tmp_path / 'm', tmp_path / 'm' / 'model.safetensors'):
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ConfigError, match='not empty; name another'):
      write(target, {'a': noise((3,), 'U8')})
    assert sorted(tmp_path.rglob('*')) == before
  with pytest.raises(ConfigError, match='model.safetensors/x.*nothing was written'):
    write(tmp_path / 'm' / 'model.safetensors' / 'x', {'a': noise((3,), 'U8')})


@pytest.mark.parametrize(
  'load',
  [
    lambda: fails(KeyError('x')),
    lambda: fails(KeyboardInterrupt()),
    lambda: np.zeros(3, np.int8),
    lambda: np.zeros(4, np.uint8),
  ],
)
def test_nothing_is_left_of_a_write_that_fails(
  tmp_path: Path, load: Callable[[], np.ndarray]
) -> None:
  good = specs({'a': noise((9,), 'U8')})
  with pytest.raises((KeyError, KeyboardInterrupt, ValueError)) as error:
    write_tensors(tmp_path / 'm', [*good, Spec('b', (3,), 'U8', load)], {})
  is_announced = 'b: announced U8 (3,), loaded' in str(error.value)
  assert is_announced or not isinstance(error.value, ValueError)
  assert not [*tmp_path.iterdir()]


def test_a_name_given_twice_is_refused_in_one_shard_and_in_two(tmp_path: Path) -> None:
  for limit in (100, 1):
    with pytest.raises(ValueError, match='twice'):
      write_tensors(tmp_path / 'm', specs({'a': noise((9,), 'U8')}) * 2, {}, limit)
  assert not [*tmp_path.iterdir()]


def test_a_disk_that_fails_is_told_and_leaves_nothing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(os, 'fsync', lambda file: fails(OSError(28, 'No space left on device')))
  with pytest.raises(ConfigError, match='m: .*No space left on device; nothing was written'):
    write(tmp_path / 'm', {'a': noise((9,), 'U8')})
  assert not [*tmp_path.iterdir()]


def test_every_file_is_on_the_disk_before_the_rename(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  fsync, rename, done, sizes = os.fsync, Path.rename, [], {}

  def synced_to(file: int) -> None:
    done.append(os.readlink(f'/proc/self/fd/{file}'))
    sizes[Path(done[-1]).name] = os.fstat(file).st_size
    fsync(file)

  def renamed_to(path: Path, target: Path) -> Path:
    done.append('rename')
    return rename(path, target)

  monkeypatch.setattr(os, 'fsync', synced_to)
  monkeypatch.setattr(Path, 'rename', renamed_to)
  arrays = {'a': noise((9,), 'U8'), 'b': noise((9,), 'U8')}
  write(tmp_path / 'm', arrays, 10, **{'config.json': '{}'})
  *synced, last, renamed, parent = done
  written = {path.name: path.stat().st_size for path in (tmp_path / 'm').iterdir()}
  temporary = re.compile(r'\.[0-9a-f]{32}\.tmp$')  # the name that each had until it was whole
  assert {temporary.sub('', Path(path).name) for path in synced} == {*written}
  whole = {temporary.sub('', name): size for name, size in sizes.items() if temporary.search(name)}
  assert whole == written
  assert (last, renamed, parent) == (str(tmp_path / 'm.moejax-partial'), 'rename', str(tmp_path))


def test_a_killed_write_leaves_what_the_next_one_takes_away_and_two_do_not_meet(
  tmp_path: Path,
) -> None:
  code = f"""
import sys, time
import numpy as np
from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import Spec
specs = [Spec('a', (9,), 'U8', lambda: np.zeros(9, np.uint8)),
         Spec('b', (9,), 'U8', lambda: (print('here', flush=True), time.sleep(60)))]
write_tensors({str(tmp_path / 'm')!r}, specs, {{}}, 10)
"""
  child = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE)
  assert child.stdout.readline() == b'here\n'
  with pytest.raises(ConfigError, match='m is being written by another process'):
    write(tmp_path / 'm', {'a': noise((2,), 'U8')})
  child.send_signal(signal.SIGKILL)
  child.communicate()
  assert [path.name for path in tmp_path.iterdir()] == ['m.moejax-partial']
  assert len([*(tmp_path / 'm.moejax-partial').iterdir()]) == 2
  write(tmp_path / 'm', {'a': noise((2,), 'U8')})
  assert sorted(path.name for path in tmp_path.rglob('*')) == ['m', 'model.safetensors']


def test_a_link_in_the_place_of_the_temporary_is_not_followed(tmp_path: Path) -> None:
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'precious' / 'thesis').touch()
  (tmp_path / 'm.moejax-partial').symlink_to('precious')
  with pytest.raises(ConfigError, match='nothing was written'):
    write(tmp_path / 'm', {'a': noise((2,), 'U8')})
  assert (tmp_path / 'precious' / 'thesis').exists()
