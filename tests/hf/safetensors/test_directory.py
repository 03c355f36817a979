"""Directories of safetensors: slices, blocks with scales, writing that is whole or not there, and nothing believed."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from moejax.config import ConfigError
from moejax.hf.safetensors import file as shards
from moejax.hf.safetensors.directory import expect, open_tensors, write_tensors
from moejax.hf.safetensors.file import DTYPES, Spec

ROOT = Path(__file__).parents[3]
STORED = {dtype: name for name, dtype in DTYPES.items()}
Arrays = dict[str, np.ndarray]


def specs(arrays: Arrays) -> list[Spec]:
  return [Spec(name, a.shape, STORED[a.dtype], lambda a=a: a) for name, a in arrays.items()]


def write(directory: Path, arrays: Arrays, max_shard_bytes: int = 10**9, **files: str) -> Path:
  write_tensors(directory, specs(arrays), files, max_shard_bytes)
  return directory


def noise(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
  """Any bytes that are a number: NaN has no place in comparisons."""
  size = math.prod(shape) * DTYPES[dtype].itemsize
  array = np.random.default_rng(seed).integers(0, 2 if dtype == 'BOOL' else 120, size, np.uint8)
  return array.view(DTYPES[dtype]).reshape(shape)


def by_library(path: Path) -> dict[str, bytes]:
  return {name: bytes(found['data']) for name, found in safetensors.deserialize(path.read_bytes())}


# ---- both ways


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
    assert (read.shape, read.dtype, tensors.dtype(name)) == (
      array.shape,
      array.dtype,
      name.split('.')[0],
    )
    assert read.tobytes() == array.tobytes() == theirs[name], name
  assert (tmp_path / 'new' / 'model' / 'tokenizer.json').read_text() == 'é'
  for file in files:  # aligned, for those who map it
    assert all(
      stored.start % DTYPES[stored.dtype].itemsize == 0
      for stored in shards.read_header(file).values()
    )
    with safetensors.safe_open(file, 'numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}


def test_one_file_is_to_the_byte_the_file_of_the_library(tmp_path: Path) -> None:
  arrays = {'a.é"': noise((3, 5), 'F32'), 'b': noise((2,), 'BF16'), 'c': noise((2, 2), 'F8_E4M3')}
  write(tmp_path / 'ours', arrays)
  save_file(arrays, tmp_path / 'theirs', metadata={'format': 'pt'})
  assert (tmp_path / 'ours' / 'model.safetensors').read_bytes() == (
    tmp_path / 'theirs'
  ).read_bytes()


def test_shards_are_filled_in_order_and_the_index_says_where(tmp_path: Path) -> None:
  write(
    tmp_path / 'm',
    {name: noise((size,), 'U8') for name, size in dict(d=300, c=40, a=60, b=1, e=7).items()},
    100,
  )
  files = [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  weight_map = dict(a=files[1], b=files[2], c=files[1], d=files[0], e=files[2])
  text = json.dumps({'metadata': {'total_size': 408}, 'weight_map': weight_map}, indent=2) + '\n'
  assert (tmp_path / 'm' / 'model.safetensors.index.json').read_text() == text
  assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == [
    *files,
    'model.safetensors.index.json',
  ]


def test_slices_are_those_of_numpy_and_only_their_bytes_are_read(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  arrays, rng, got = (
    {'a': noise((6, 1, 5, 4), 'BF16'), 'b': noise((9,), 'F64'), 'c': noise((), 'I32')},
    np.random.default_rng(1),
    [],
  )
  tensors, preadv = open_tensors(write(tmp_path / 'm', arrays)), os.preadv

  def counted(file: int, buffers: list[memoryview], at: int) -> int:
    got.append(preadv(file, [buffers[0][:7]], at))  # the system may give less than was asked for
    return got[-1]

  monkeypatch.setattr(os, 'preadv', counted)
  for _ in range(150):
    for name, array in arrays.items():
      index = tuple(
        slice(*rng.choice([None, -9, -2, 0, 1, 2, 4, 9], 2))
        for _ in range(rng.integers(array.ndim + 1))
      )
      got.clear()
      read = tensors.read(name, index)
      np.testing.assert_array_equal(read, array[index], err_msg=f'{name} {index}')
      assert sum(got) == read.nbytes
  for index in ((slice(0, 4, 2),), (slice(None),) * 5):
    with pytest.raises(IndexError, match='slices'):
      tensors.read('a', index)


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
  size = 1 << 22
  calls = [
    Spec(f't{i}', (1 << 10, 1 << 10), 'F32', lambda i=i: np.full((1 << 10, 1 << 10), i, np.float32))
    for i in range(8)
  ]
  tracemalloc.start()
  try:
    write_tensors(tmp_path / 'm', calls, {}, 3 * size)
    assert size < tracemalloc.get_traced_memory()[1] < 1.5 * size
    tracemalloc.reset_peak()
    tensors = open_tensors(tmp_path / 'm')
    assert all((tensors.read(f't{i}') == i).all() for i in range(8))
    assert size < tracemalloc.get_traced_memory()[1] < 1.5 * size
  finally:
    tracemalloc.stop()


def test_a_view_that_does_not_lie_in_order_is_copied_piece_by_piece(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(shards, 'CHUNK', 64)
  array = noise((50, 12), 'F32').T[:, ::2]
  assert (open_tensors(write(tmp_path / 'm', {'a': array})).read('a') == array).all()


# ---- blocks with scales


@pytest.mark.parametrize('block', [(128, 128), (3, 5)])
def test_fp8_is_weight_times_the_scale_of_its_block(tmp_path: Path, block: tuple[int, int]) -> None:
  (height, width), rng = block, np.random.default_rng(2)
  o, i = 2 * height + 1, 3 * width - 2
  weight = rng.normal(size=(o, i)).astype(DTYPES['F8_E4M3'])
  scale = rng.uniform(1e-4, 3, (3, 3)).astype(np.float32)
  config = (
    '{}'
    if block == (128, 128)
    else json.dumps({'quantization_config': {'weight_block_size': block}})
  )
  arrays = {'x.weight': weight, 'x.weight_scale_inv': scale, 'norm.weight': noise((3,), 'BF16')}
  tensors = open_tensors(write(tmp_path / 'm', arrays, **{'config.json': config}))
  oracle = np.array(
    [
      [np.float32(weight[r, c]) * scale[r // height, c // width] for c in range(i)]
      for r in range(o)
    ]
  )
  assert {*tensors.names} == {'x.weight', 'norm.weight'}
  assert (tensors.shape('x.weight'), tensors.dtype('x.weight')) == ((o, i), 'F32')
  assert tensors.read('x.weight').dtype == np.float32
  for _ in range(30):
    (a, b), (c, d) = rng.integers(0, o + 1, 2), rng.integers(0, i + 1, 2)
    np.testing.assert_array_equal(
      tensors.read('x.weight', (slice(a, b), slice(c, d))), oracle[a:b, c:d]
    )
  np.testing.assert_array_equal(tensors.read('x.weight'), oracle)


def test_mxfp4_is_unpacked_low_nibble_first_scaled_and_turned(tmp_path: Path) -> None:
  rng, (experts, rows, groups) = np.random.default_rng(3), (2, 8, 3)
  table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
  blocks = rng.permutation(np.arange(experts * rows * groups * 16) % 256).astype(np.uint8)
  blocks = blocks.reshape(experts, rows, groups, 16)
  scales = rng.integers(100, 140, (experts, rows, groups)).astype(np.uint8)
  scales[0, 0] = 0, 1, 251  # the smallest are not normal numbers, and 6 * 2^124 still fits
  oracle = np.zeros((experts, groups * 32, rows))
  for e, r, g, byte in np.ndindex(blocks.shape):
    for half, nibble in enumerate((blocks[e, r, g, byte] % 16, blocks[e, r, g, byte] // 16)):
      oracle[e, 32 * g + 2 * byte + half, r] = table[nibble] * 2.0 ** (int(scales[e, r, g]) - 127)
  arrays = {
    'mlp.down_proj_blocks': blocks,
    'mlp.down_proj_scales': scales,
    'mlp.x_blocks': noise((3,), 'BF16'),
  }
  tensors = open_tensors(write(tmp_path / 'm', arrays))
  assert {*tensors.names} == {'mlp.down_proj', 'mlp.x_blocks'}
  assert (tensors.shape('mlp.down_proj'), tensors.dtype('mlp.down_proj')) == (oracle.shape, 'BF16')
  read = tensors.read('mlp.down_proj')
  assert read.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(read.astype(np.float64), oracle)
  assert (np.signbit(read) == np.signbit(oracle)).all()
  for _ in range(50):
    index = tuple(slice(*rng.integers(0, n + 1, 2)) for n in oracle.shape)
    np.testing.assert_array_equal(
      tensors.read('mlp.down_proj', index).astype(np.float64), oracle[index]
    )


# ---- bad input


def raw(path: Path, header: object, data: bytes = b'', length: int | None = None) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)


def entry(start: int, stop: int, *shape: int, dtype: str = 'U8') -> dict[str, object]:
  return {'dtype': dtype, 'shape': shape, 'data_offsets': (start, stop)}


def index(path: Path, weight_map: object) -> None:
  (path / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': weight_map})
  )


def files(case: Callable[[Path], None]) -> Callable[[Path], None]:
  """A directory of one good file `a.safetensors` with tensor t, to which the case adds what is wrong."""

  def build(path: Path) -> None:
    raw(path / 'a.safetensors', {'t': entry(0, 3, 3)}, b'abc')
    case(path)

  return build


def one(header: object, data: bytes = b'', length: int | None = None) -> Callable[[Path], None]:
  return lambda path: raw(path / 'model.safetensors', header, data, length)


def blocks(**arrays: np.ndarray) -> Callable[[Path], None]:
  return lambda path: save_file(arrays, path / 'model.safetensors')


def outside(path: Path) -> None:
  raw(path.parent / 'out.safetensors', {'t': entry(0, 3, 3)}, b'abc')
  (path / 'link.safetensors').symlink_to(path.parent / 'out.safetensors')
  index(path, {'t': 'link.safetensors'})


def circle(path: Path) -> None:
  (path / 'model.safetensors').symlink_to('model.safetensors')


F8 = noise((130, 5), 'F8_E4M3')
U8 = noise((2, 3, 4, 16), 'U8')
SCALE = np.ones((2, 1), np.float32)
BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
  'no directory': (
    lambda path: path.rmdir(),
    ['no directory', 'model.safetensors', 'name the directory'],
  ),
  'neither file': (lambda path: None, ['neither', 'model.safetensors.index.json']),
  'both files': (
    files(
      lambda path: (index(path, {}), (path / 'a.safetensors').rename(path / 'model.safetensors'))
    ),
    ['both', 'move away'],
  ),
  'a directory as file': (lambda path: (path / 'model.safetensors').mkdir(), ['neither']),
  'links in a circle': (circle, ['model.safetensors']),
  'pickle': (
    lambda path: (path / 'pytorch_model.bin').write_bytes(b'?'),
    ['pytorch_model.bin', 'never unpickled', 'safe_serialization'],
  ),
  'index of a pickle': (
    files(
      lambda path: ((path / 'a.safetensors').rename(path / 'a.bin'), index(path, {'t': 'a.bin'}))
    ),
    ['index.json', 'a.bin', 'nothing else is read'],
  ),
  'index of a name too long': (
    files(lambda path: index(path, {'t': 'a' * 999 + '.safetensors'})),
    ['aaa.safetensors'],
  ),
  'index upwards': (
    lambda path: (outside(path), index(path, {'t': '../out.safetensors'})),
    ["'../out.saf", 'inside'],
  ),
  'index absolute': (
    lambda path: (outside(path), index(path, {'t': str(path.parent / 'out.safetensors')})),
    ['out.safetensors', 'inside'],
  ),
  'index by a link': (outside, ["'link.safetensors'", '/out.safetensors', 'inside']),
  'index of a zero byte': (
    files(lambda path: index(path, {'t': 'a\0.safetensors'})),
    ['index.json', 'weight_map'],
  ),
  'index of a number': (
    files(lambda path: index(path, {'t': 3})),
    ['index.json', 'weight_map', "{'t': 3}"],
  ),
  'index of a list': (
    files(lambda path: index(path, ['t'])),
    ['index.json', 'weight_map', "['t']"],
  ),
  'index without a map': (
    lambda path: (path / 'model.safetensors.index.json').write_text('{}'),
    ['weight_map', 'None'],
  ),
  'index not JSON': (
    lambda path: (path / 'model.safetensors.index.json').write_text('{'),
    ['JSON', 'index.json'],
  ),
  'shard missing': (
    files(lambda path: index(path, {'t': 'a.safetensors', 'u': 'b.safetensors'})),
    ['index.json', '2 shards', '1 missing: b.safetensors'],
  ),
  'shard lacks a tensor': (
    files(lambda path: index(path, {'t': 'a.safetensors', 'u': 'a.safetensors'})),
    ['a.safetensors', 'the 2 tensors', 'missing u; extra none'],
  ),
  'index lacks a tensor': (
    files(
      lambda path: (
        raw(path / 'b.safetensors', {'t': entry(0, 1, 1), 'u': entry(1, 2, 1)}, b'ab'),
        index(path, {'t': 'a.safetensors', 'u': 'b.safetensors'}),
      )
    ),
    ['b.safetensors', 'missing none; extra t'],
  ),
  'empty file': (lambda path: (path / 'model.safetensors').touch(), ['model.safetensors', 'JSON']),
  'no whole length': (
    lambda path: (path / 'model.safetensors').write_bytes(b'\1\0\0'),
    ['at most 0', 'of 3'],
  ),
  'header cut': (one(b'{}', length=3), ['at most 2 bytes in a file of 10', 'length 3']),
  'header far too large': (one(b'{}', length=2**64 - 1), ['at most 2 bytes', str(2**64 - 1)]),
  'header not JSON': (one(b'{"t": '), ['JSON', 'model.safetensors']),
  'header not UTF-8': (one(b'{"\xff": 1}'), ['JSON', 'UnicodeDecodeError']),
  'header too deep': (one(b'[' * 100_000), ['JSON', 'RecursionError']),
  'header of endless number': (one(b'{"t": ' + b'9' * 5000 + b'}'), ['JSON', 'digits']),
  'header a list': (one([]), ['object', 'list']),
  'metadata of numbers': (one({'__metadata__': {'a': 1}}), ['__metadata__', "{'a': 1}"]),
  'metadata a text': (one({'__metadata__': 'a'}), ['__metadata__']),
  'tensor a list': (one({'t': []}), ["'t'", 'data_offsets', '[]']),
  'shape of a truth': (one({'t': {**entry(0, 1), 'shape': [True]}}, b'a'), ["'t'", '[True]']),
  'shape below zero': (one({'t': entry(0, 1, -1, -1)}, b'a'), ["'t'", '[-1, -1]']),
  'shape of fractions': (one({'t': entry(0, 1, 1.0)}, b'a'), ["'t'", '[1.0]']),
  'shape beyond NumPy': (one({'t': entry(0, 0, 0, 2**40, 2**40)}), ["'t'", '2^56']),
  'axes beyond NumPy': (one({'t': entry(0, 1, *[1] * 65)}, b'a'), ["'t'", '32 axes']),
  'offsets of three': (
    one({'t': {**entry(0, 1, 1), 'data_offsets': [0, 1, 1]}}, b'a'),
    ["'t'", '[0, 1, 1]'],
  ),
  'offsets and shape': (one({'t': entry(0, 3, 2)}, b'abc'), ["2 bytes for 't' U8 [2]", '[0, 3]']),
  'offsets reversed': (one({'t': entry(3, 0, 3)}, b'abc'), ["3 bytes for 't'", '[3, 0]']),
  'offsets overlap': (
    one({'t': entry(0, 2, 2), 'u': entry(1, 3, 2)}, b'abc'),
    ["'u' to begin at", 'damaged'],
  ),
  'offsets leave a hole': (
    one({'t': entry(0, 1, 1), 'u': entry(2, 3, 1)}, b'abc'),
    ["'u' to begin at"],
  ),
  'offsets beyond the end': (
    one({'t': entry(0, 3, 3)}, b'ab'),
    ['where the last tensor ends', 'cut short'],
  ),
  'bytes left over': (one({'t': entry(0, 3, 3)}, b'abcd'), ['where the last tensor ends']),
  'dtype unknown': (one({'t': entry(0, 1, 2, dtype='F4')}, b'a'), ["'t'", "'F4'", 'BF16']),
  'tensor twice': (one(b'{"t":{},"t":{}}'), ["'t'", 'duplicated']),
  'index with a tensor twice': (
    lambda path: (path / 'model.safetensors.index.json').write_text(
      '{"weight_map": {"t": "a", "t": "b"}}'
    ),
    ["'t'", 'duplicated', 'index.json'],
  ),
  'name with a control character': (
    one({'a\x1b[2J': entry(0, 1, 1)}, b'a'),
    [r"'a\x1b[2J'", 'printed'],
  ),
  'fp8 without scale': (
    blocks(**{'w.weight': F8}),
    ["'w.weight_scale_inv' F32 (2, 1)", 'no such tensor'],
  ),
  'fp8 of another scale': (
    blocks(w=F8, w_scale_inv=SCALE.T.copy()),
    ["'w_scale_inv'", 'F32 (2, 1)', '(1, 2)'],
  ),
  'fp8 of scales in halves': (
    blocks(w=F8, w_scale_inv=SCALE.astype(np.float16)),
    ["'w_scale_inv'", 'F16 (2, 1)'],
  ),
  'fp8 of one axis': (blocks(w=F8[0]), ["'w'", 'two axes', '(5,)']),
  'block size of config': (
    lambda path: (
      blocks(w=F8, w_scale_inv=SCALE)(path),
      (path / 'config.json').write_text('{"quantization_config": {"weight_block_size": [128, 0]}}'),
    ),
    ['config.json', '[128, 0]'],
  ),
  'config not JSON': (
    lambda path: (blocks(w=SCALE)(path), (path / 'config.json').write_text('?')),
    ['config.json'],
  ),
  'fp4 without scales': (blocks(w_blocks=U8), ["'w_scales' U8 (2, 3, 4)", 'no such tensor']),
  'fp4 of other scales': (
    blocks(w_blocks=U8, w_scales=U8[0, :, :, 0]),
    ["'w_scales'", '(2, 3, 4)', '(3, 4)'],
  ),
  'fp4 of other blocks': (
    blocks(w_blocks=U8[..., :8].copy(), w_scales=U8[..., 0].copy()),
    ["'w_blocks'", '(2, 3, 4, 8)'],
  ),
  'fp4 and the weight': (blocks(w_blocks=U8, w_scales=U8[..., 0].copy(), w=U8), ["no 'w' beside"]),
}


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


def test_an_empty_tensor_may_stand_anywhere_in_the_header(tmp_path: Path) -> None:
  raw(
    tmp_path / 'model.safetensors',
    {'t': entry(0, 2, 2), 'u': entry(0, 0, 0), 'v': entry(2, 2, 0, 3)},
    b'ab',
  )
  tensors = open_tensors(tmp_path)
  assert [tensors.read(name).tobytes() for name in 'tuv'] == [b'ab', b'', b'']


def test_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
  """What we accept, the library accepts too, and reads the same."""
  arrays = {
    'layer.0.weight': noise((3, 4), 'BF16'),
    'layer.1.weight': noise((2, 5), 'BF16'),
    'b': noise((7,), 'U8'),
  }
  whole, rng, accepted = (
    (write(tmp_path / 'm', arrays) / 'model.safetensors').read_bytes(),
    np.random.default_rng(4),
    0,
  )
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
  tensors = open_tensors(
    write(tmp_path / 'm', {f'x{i:02d}': noise((i, 2), 'U8') for i in range(30)})
  )
  wanted = {f'x{i:02d}': (i, 3 if i >= 18 else 2) for i in range(6, 30)} | {
    f'y{i}': (1,) for i in range(11)
  }
  expect(tensors, {name: tensors.shape(name) for name in tensors.names})
  with pytest.raises(ConfigError) as error:
    expect(tensors, wanted)
  missing, extra, other = error.value.problems
  assert (
    '11 tensors missing: y0 (1,), y1 (1,), y10 (1,)' in missing
    and 'y8' in missing
    and 'y9' not in missing
  )
  assert ' and 1 more' in missing and 'config.json' in missing
  assert '6 tensors extra: x00 (0, 2) in model.safetensors, ' in extra and 'more' not in extra
  assert (
    '12 tensors of another shape: x18: expected (18, 3), found (18, 2) in model.safetensors'
    in other
  )
  assert ' and 2 more' in other


# ---- writing is whole or not there


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
  with pytest.raises((KeyError, KeyboardInterrupt, ValueError)) as error:
    write_tensors(
      tmp_path / 'm', [*specs({'a': noise((9,), 'U8')}), Spec('b', (3,), 'U8', load)], {}
    )
  assert not isinstance(error.value, ValueError) or 'b: announced U8 (3,), loaded' in str(
    error.value
  )
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

  monkeypatch.setattr(os, 'fsync', synced_to)
  monkeypatch.setattr(
    Path, 'rename', lambda path, target: (done.append('rename'), rename(path, target))[1]
  )
  write(
    tmp_path / 'm', {'a': noise((9,), 'U8'), 'b': noise((9,), 'U8')}, 10, **{'config.json': '{}'}
  )
  *synced, last, renamed, parent = done
  written = {path.name: path.stat().st_size for path in (tmp_path / 'm').iterdir()}
  temporary = re.compile(r'\.[0-9a-f]{32}\.tmp$')  # the name that each had until it was whole
  assert {temporary.sub('', Path(path).name) for path in synced} == {*written}
  assert {
    temporary.sub('', name): size for name, size in sizes.items() if temporary.search(name)
  } == written
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
