"""Directories of tensors: to the byte, in shards, and nothing in them is believed."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors

from moejax.config import ConfigError
from moejax.hf.safetensors.directory import expect, open_tensors
from moejax.hf.safetensors.file import DTYPES, read_header
from tests.hf.safetensors.bad_directories import BAD
from tests.hf.safetensors.tensor_files import by_library, entry, noise, raw, write


@pytest.mark.parametrize('limit', [10**9, 700], ids=['one', 'shards'])
def test_what_is_written_is_read_to_the_byte_by_us_and_by_the_library(
  tmp_path: Path, limit: int
) -> None:
  arrays = {
    f'{name}.{shape}': noise(shape, name)
    for name in DTYPES
    if name != 'F8_E4M3'
    for shape in ((), (3, 0), (7,), (5, 4, 3))
  }
  write(tmp_path / 'new' / 'model', arrays, limit, **{'config.json': '{}', 'tokenizer.json': 'é'})
  tensors = open_tensors(tmp_path / 'new' / 'model')
  assert {*tensors.names} == {*arrays}
  files = sorted((tmp_path / 'new' / 'model').glob('*.safetensors'))
  assert (len(files) > 3) == (limit < 10**9)
  theirs = {name: data for file in files for name, data in by_library(file).items()}
  for name, array in arrays.items():
    read = tensors.read(name)
    assert (read.shape, read.dtype) == (array.shape, array.dtype)
    assert tensors.dtype(name) == name.split('.')[0]
    assert read.tobytes() == array.tobytes() == theirs[name], name
  assert (tmp_path / 'new' / 'model' / 'tokenizer.json').read_text() == 'é'
  for file in files:
    for stored in read_header(file).values():
      assert stored.start % DTYPES[stored.dtype].itemsize == 0, 'aligned, for those who map it'
    with safetensors.safe_open(file, 'numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}


def test_shards_are_filled_in_order_and_the_index_says_where(tmp_path: Path) -> None:
  sizes = dict(d=300, c=40, a=60, b=1, e=7)
  write(tmp_path / 'm', {name: noise((size,), 'U8') for name, size in sizes.items()}, 100)
  files = [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  weight_map = dict(a=files[1], b=files[2], c=files[1], d=files[0], e=files[2])
  text = json.dumps({'metadata': {'total_size': 408}, 'weight_map': weight_map}, indent=2) + '\n'
  assert (tmp_path / 'm' / 'model.safetensors.index.json').read_text() == text
  names = sorted(path.name for path in (tmp_path / 'm').iterdir())
  assert names == [*files, 'model.safetensors.index.json']


@pytest.mark.parametrize('case', BAD)
def test_what_cannot_be_trusted_is_refused_in_one_message(tmp_path: Path, case: str) -> None:
  build, says = BAD[case]
  (tmp_path / 'm').mkdir()
  build(tmp_path / 'm')
  with pytest.raises(ConfigError) as error:
    open_tensors(tmp_path / 'm')
  assert len(error.value.problems) == 1 and str(error.value).startswith(str(tmp_path / 'm'))
  assert all(text in str(error.value) for text in says), str(error.value)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
  class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
      return os.mkdir, (str(tmp_path / 'run'),)

  for name in ('pytorch_model.bin', 'model.pt', 'model.safetensors', 'config.json'):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError):
      open_tensors(tmp_path)
  assert not (tmp_path / 'run').exists()


def test_a_tensor_that_is_not_there_and_a_file_that_shrank(tmp_path: Path) -> None:
  tensors = open_tensors(write(tmp_path / 'm', {'a': noise((9,), 'F32')}))
  with pytest.raises(ConfigError, match="no tensor 'b'; it has a"):
    tensors.read('b')
  os.truncate(tmp_path / 'm' / 'model.safetensors', 100)
  with pytest.raises(
    ConfigError, match=r"model.safetensors: expected \d+ bytes of 'a' at 100, found the end"
  ):
    tensors.read('a')


def test_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
  """What we accept, the library accepts too, and reads the same."""
  arrays = {
    'layer.0.weight': noise((3, 4), 'BF16'),
    'layer.1.weight': noise((2, 5), 'BF16'),
    'b': noise((7,), 'U8'),
  }
  whole = (write(tmp_path / 'm', arrays) / 'model.safetensors').read_bytes()
  rng, accepted = np.random.default_rng(4), 0
  end = 8 + int.from_bytes(whole[:8], 'little')
  for i in range(300):
    bad, path = bytearray(whole), tmp_path / str(i) / 'model.safetensors'
    for at in rng.integers(0, end, rng.integers(0, 4)):
      bad[at] = rng.choice([bad[at] ^ 1 << rng.integers(8), *b'0123456789"{}[],:'])
    path.parent.mkdir()
    path.write_bytes(bad[: rng.integers(len(bad)) if i % 5 == 0 else None])
    try:
      tensors = open_tensors(path.parent)
      read = {name: tensors.read(name).tobytes() for name in tensors.names}
    except ConfigError as error:
      assert str(path.parent) in str(error) and len(error.problems) == 1
    else:
      accepted += 1
      assert read == by_library(path)
  assert 20 < accepted < 200


def test_the_cache_of_snapshots_may_link_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
  blobs, snapshot = tmp_path / 'models--x' / 'blobs', tmp_path / 'models--x' / 'snapshots' / '0a'
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  raw(blobs / '1f', {'t': entry(0, 3, 3)}, b'abc')
  raw(blobs.parent / '2f', {'t': entry(0, 3, 3)}, b'abc')
  (snapshot / 'model.safetensors').symlink_to('../../blobs/1f')
  assert open_tensors(snapshot).read('t').tobytes() == b'abc'
  (snapshot / 'model.safetensors').unlink()
  (snapshot / 'model.safetensors').symlink_to('../../2f')
  with pytest.raises(ConfigError, match='inside'):
    open_tensors(snapshot)


def test_all_that_is_unexpected_is_told_at_once(tmp_path: Path) -> None:
  arrays = {f'x{i:02d}': noise((i, 2), 'U8') for i in range(30)}
  tensors = open_tensors(write(tmp_path / 'm', arrays))
  wanted = {f'x{i:02d}': (i, 3 if i >= 18 else 2) for i in range(6, 30)}
  wanted |= {f'y{i}': (1,) for i in range(11)}
  expect(tensors, {name: tensors.shape(name) for name in tensors.names})
  with pytest.raises(ConfigError) as error:
    expect(tensors, wanted)
  missing, extra, other = error.value.problems
  assert '11 tensors missing: y0 (1,), y1 (1,), y10 (1,)' in missing
  assert 'y8' in missing and 'y9' not in missing
  assert ' and 1 more' in missing and 'config.json' in missing
  assert '6 tensors extra: x00 (0, 2) in model.safetensors, ' in extra and 'more' not in extra
  first = 'x18: expected (18, 3), found (18, 2) in model.safetensors'
  assert f'12 tensors of another shape: {first}' in other and ' and 2 more' in other
