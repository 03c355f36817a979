"""Directories of tensors that must not be trusted: how each is made, and what its message says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.hf.safetensors.tensor_files import entry, noise, raw


def index(path: Path, weight_map: object) -> None:
  (path / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': weight_map})
  )


def files(case: Callable[[Path], None]) -> Callable[[Path], None]:
  """A directory of one good file `a.safetensors` with tensor t, which the case then spoils."""

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
    ['b.safetensors', 'missing none; extra t', 'not of one save'],
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
    ["'u' to begin at", 'save_file of safetensors'],
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
