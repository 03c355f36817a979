"""Blocks with scales, read as the weights that they stand for."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax.hf.safetensors.directory import open_tensors
from moejax.hf.safetensors.file import DTYPES
from tests.hf.safetensors.tensor_files import noise, write


@pytest.mark.parametrize('block', [(128, 128), (3, 5)])
def test_fp8_is_weight_times_the_scale_of_its_block(tmp_path: Path, block: tuple[int, int]) -> None:
  (height, width), rng = block, np.random.default_rng(2)
  o, i = 2 * height + 1, 3 * width - 2
  weight = rng.normal(size=(o, i)).astype(DTYPES['F8_E4M3'])
  scale = rng.uniform(1e-4, 3, (3, 3)).astype(np.float32)
  is_default = block == (128, 128)
  config = {} if is_default else {'quantization_config': {'weight_block_size': block}}
  arrays = {'x.weight': weight, 'x.weight_scale_inv': scale, 'norm.weight': noise((3,), 'BF16')}
  tensors = open_tensors(write(tmp_path / 'm', arrays, **{'config.json': json.dumps(config)}))
  oracle = np.zeros((o, i), np.float32)
  for r, c in np.ndindex(o, i):
    oracle[r, c] = np.float32(weight[r, c]) * scale[r // height, c // width]
  assert {*tensors.names} == {'x.weight', 'norm.weight'}
  assert (tensors.shape('x.weight'), tensors.dtype('x.weight')) == ((o, i), 'F32')
  assert tensors.read('x.weight').dtype == np.float32
  for _ in range(30):
    (a, b), (c, d) = rng.integers(0, o + 1, 2), rng.integers(0, i + 1, 2)
    part = tensors.read('x.weight', (slice(a, b), slice(c, d)))
    np.testing.assert_array_equal(part, oracle[a:b, c:d])
  np.testing.assert_array_equal(tensors.read('x.weight'), oracle)


@pytest.mark.parametrize('name', ['x.weight_scale', 'x.weight_scale_inv'])
@pytest.mark.parametrize('dtype', ['F32', 'BF16'])
@pytest.mark.parametrize('shape', [(), (1,), (1, 1), (7,), (7, 1), (3, 2)], ids=str)
def test_fp8_has_a_scale_for_all_of_it_for_each_row_or_for_each_block(
  shape: tuple[int, ...], dtype: str, name: str, tmp_path: Path
) -> None:
  """As compressed-tensors, vLLM and transformers write it."""
  rng = np.random.default_rng(2)
  weight = rng.normal(size=(7, 5)).astype(DTYPES['F8_E4M3'])
  scale = rng.uniform(0.5, 3, shape).astype(DTYPES[dtype])
  config = {'config.json': json.dumps({'quantization_config': {'weight_block_size': [3, 3]}})}
  arrays = {'x.weight': weight, name: np.asarray(scale)}
  tensors = open_tensors(write(tmp_path / 'm', arrays, **config))
  scales = np.asarray(scale, np.float32)
  if shape == (3, 2):
    scales = np.kron(scales, np.ones((3, 3), np.float32))[:7, :5]
  elif shape == (7,):
    scales = scales[:, None]
  np.testing.assert_array_equal(tensors.read('x.weight'), weight.astype(np.float32) * scales)
  assert tensors.names == ('x.weight',)


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
    part = tensors.read('mlp.down_proj', index).astype(np.float64)
    np.testing.assert_array_equal(part, oracle[index])
