"""Weights published as blocks with a scale each, read as the numbers they stand for.

unquantised({name: Stored}, block) -> {name: Stored or such a weight}, which hides blocks and scales

Letters: o, i rows and columns of a weight; E experts; R rows; G groups of 32 values of a row.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moejax.hf.safetensors.file import DTYPES, Index, Stored, slice_bounds
from moejax.runtime.files import bad_file

SCALE_DTYPES = ('F32', 'BF16')
# The remedy for parts that do not fit: another copy of the same files would be the same.
NOT_KNOWN = (
  'this scheme is not known here: take the files in bfloat16, or write them with '
  'model.dequantize() and save_pretrained of transformers'
)
GROUP = 32  # values of MXFP4 that share a scale: 16 bytes
# What a byte stands for: looking it up takes half the time of a cast.
_BYTES = np.arange(256, dtype=np.uint8)
_FP8 = _BYTES.view(DTYPES['F8_E4M3']).astype(np.float32)  # [256]
_NIBBLES = np.stack([_BYTES & 15, _BYTES >> 4], 1)  # [256, 2], low first
_FP4 = _NIBBLES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # [256, 2]


class BlockSize(NamedTuple):
  """The numbers of a weight that share a scale."""

  rows: int
  columns: int


@dataclasses.dataclass(frozen=True)
class ScaledBlocks:
  """FP8 as DeepSeek publishes it: weight [o, i] times the scale of its block.

  One multiplies, though the tensor is called `scale_inv`: it is the inverse of the scale that was
  multiplied by.
  """

  path: Path
  shape: tuple[int, ...]
  weight: Stored  # [o, i]
  scale: Stored  # [ceil(o / rows), ceil(i / columns)] of the block, in one of SCALE_DTYPES
  block: BlockSize
  dtype = 'F32'  # products with a float32 scale fit nothing smaller

  def read(self, index: Index = ()) -> np.ndarray:
    """Returns the slice in float32."""
    (top, bottom), (left, right) = slice_bounds(self.shape, index)
    h, w = self.block
    # The scales of all blocks that the slice touches.
    rows = slice(top // h, -(-bottom // h))
    columns = slice(left // w, -(-right // w))
    scale = self.scale.read((rows, columns)).astype(np.float32)
    out = np.take(_FP8, self.weight.read(index).view(np.uint8))  # [o, i] f32
    block_of_column = np.arange(left, right) // w - columns.start
    # A row of blocks at a time: a scale for every element would be a second tensor.
    for i, row in enumerate(scale):
      begin = (rows.start + i) * h - top
      out[max(0, begin) : begin + h] *= row[block_of_column]
    return out


@dataclasses.dataclass(frozen=True)
class PackedFP4:
  """MXFP4 as gpt-oss publishes it.

  The weight is [E, 32 G, R]: its last two axes are swapped, as in a file that is not quantised.
  """

  path: Path
  shape: tuple[int, ...]
  blocks: Stored  # [E, R, G, 16], two values a byte
  scales: Stored  # [E, R, G], 2^(scale - 127)
  dtype = 'BF16'  # exact: four bits times a power of two

  def read(self, index: Index = ()) -> np.ndarray:
    """Returns the slice in bfloat16; scale 255 is NaN, as the format has it."""
    (first, last), (top, bottom), rows = slice_bounds(self.shape, index)
    groups = slice(top // GROUP, -(-bottom // GROUP))
    skipped = top - groups.start * GROUP  # values of the first group that lie before the slice
    out = np.empty((last - first, bottom - top, rows[1] - rows[0]), DTYPES[self.dtype])
    for expert in range(first, last):  # beside the result lies one expert
      where = slice(expert, expert + 1), slice(*rows), groups
      scales = self.scales.read(where)[0].view(DTYPES['F8_E8M0']).astype(np.float32)  # [R, G]
      values = np.take(_FP4, self.blocks.read(where)[0], axis=0)  # [R, G, 16, 2] f32
      values *= scales[..., None, None]
      values = values.reshape(len(scales), scales.shape[1] * GROUP).astype(out.dtype)
      out[expert - first] = values[:, skipped : skipped + bottom - top].T
    return out


def unquantised(
  stored: Mapping[str, Stored], block: BlockSize
) -> dict[str, Stored | ScaledBlocks | PackedFP4]:
  """Returns the tensors with every weight whole, and none of the parts that it lies in.

  Args:
    stored: name -> what lies in the files.
    block: the size of a block of FP8.

  Raises:
    ConfigError: a part of a weight is missing or has another shape.
  """
  whole: dict[str, Stored | ScaledBlocks | PackedFP4] = dict(stored)
  for name, tensor in stored.items():
    if tensor.dtype == 'F8_E4M3':
      _expect(tensor, len(tensor.shape) == 2, 'a weight of two axes')
      whole[name] = _scaled(stored, tensor, block)
      del whole[whole[name].scale.name]
    elif tensor.dtype == 'U8' and name.endswith('_blocks'):
      has_groups = len(tensor.shape) == 4 and tensor.shape[3] * 2 == GROUP
      _expect(tensor, has_groups, 'U8 (experts, rows, groups, 16)')
      base = name.removesuffix('_blocks')
      scales = _part(stored, tensor, f'{base}_scales', 'U8', tensor.shape[:3])
      _expect(tensor, base not in stored, f'no {base!r} beside it')
      experts, rows, groups = scales.shape
      del whole[name], whole[scales.name]
      whole[base] = PackedFP4(tensor.path, (experts, groups * GROUP, rows), tensor, scales)
  return whole


def _scaled(stored: Mapping[str, Stored], weight: Stored, block: BlockSize) -> ScaledBlocks:
  """An FP8 weight [o, i] with its scales: of blocks, of rows, or one for all of it.

  DeepSeek and transformers call them `scale_inv`, compressed-tensors and vLLM `scale`; both are
  what one multiplies by.
  """
  o, i = weight.shape
  in_blocks = tuple(-(-n // size) for n, size in zip(weight.shape, block))
  name = f'{weight.name}_scale'
  if name not in stored:
    name = f'{weight.name}_scale_inv'
  if name in stored and stored[name].dtype in SCALE_DTYPES:
    scale = stored[name]
    # shape of the scales -> the numbers that share one
    layouts = {(): (o, i), (1,): (o, i), (1, 1): (o, i), (o,): (1, i), (o, 1): (1, i)}
    layouts[in_blocks] = block
    if scale.shape in layouts:
      size = BlockSize(*layouts[scale.shape])
      grid = tuple(-(-n // m) for n, m in zip(weight.shape, size))
      # The same bytes in the shape of a grid of blocks.
      scale = dataclasses.replace(scale, shape=grid)
      return ScaledBlocks(weight.path, weight.shape, weight, scale, size)
  return ScaledBlocks(
    weight.path, weight.shape, weight, _part(stored, weight, name, 'F32', in_blocks), block
  )


def _part(
  stored: Mapping[str, Stored], blocks: Stored, name: str, dtype: str, shape: tuple[int, ...]
) -> Stored:
  """The scales of some blocks, which must be there and have that dtype and shape."""
  if name not in stored:
    expected = f'{name!r} {dtype} {shape}, the scales of {blocks.name!r}'
    raise bad_file(blocks.path, expected, 'no such tensor', NOT_KNOWN)
  part = stored[name]
  _expect(part, (part.dtype, part.shape) == (dtype, shape), f'{dtype} {shape}')
  return part


def _expect(tensor: Stored, holds: bool, expected: str) -> None:
  """Raises ConfigError of the file where it does not hold what is expected."""
  if not holds:
    found = f'{tensor.dtype} {tensor.shape}'
    raise bad_file(tensor.path, f'{tensor.name!r}: {expected}', found, NOT_KNOWN)
