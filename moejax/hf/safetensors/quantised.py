"""Weights published as blocks with a scale each, read as the numbers they stand for.

unquantised({name: Stored}, block) -> {name: Stored or such a weight}: blocks and scales are hidden behind it.
Letters: o, i rows and columns of a weight; E experts; R rows; G groups of 32 values of a row.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.hf.safetensors.file import DTYPES, Index, Stored, slice_bounds
from moejax.runtime.files import bad_file

GROUP = 32  # values of MXFP4 that share a scale: 16 bytes
# What a byte stands for: looking it up takes half the time of a cast.
_BYTES = np.arange(256, dtype=np.uint8)
_FP8 = _BYTES.view(DTYPES['F8_E4M3']).astype(np.float32)  # [256]
_FP4 = (
  np.stack([_BYTES & 15, _BYTES >> 4], 1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
)  # [256, 2], low first


@dataclasses.dataclass(frozen=True)
class ScaledBlocks:
  """FP8 as DeepSeek publishes it: weight [o, i] times the scale of its block; scales [ceil(o/h), ceil(i/w)].

  One multiplies, though the tensor is called `scale_inv`: it is the inverse of the scale that was multiplied by.
  """

  path: Path
  shape: tuple[int, ...]
  weight: Stored
  scale: Stored
  block: tuple[int, int]
  dtype = 'F32'  # products with a float32 scale fit nothing smaller

  def read(self, index: Index = ()) -> np.ndarray:
    """The slice in float32."""
    (top, bottom), (left, right) = slice_bounds(self.shape, index)
    h, w = self.block
    scale = self.scale.read((slice(top // h, -(-bottom // h)), slice(left // w, -(-right // w))))
    out = np.take(_FP8, self.weight.read(index).view(np.uint8))  # [o, i] f32
    columns = np.arange(left, right) // w - left // w
    for i, row in enumerate(
      scale
    ):  # a row of blocks at a time: a scale for every element would be a second tensor
      begin = (top // h + i) * h - top
      out[max(0, begin) : begin + h] *= row[columns]
    return out


@dataclasses.dataclass(frozen=True)
class PackedFP4:
  """MXFP4 as gpt-oss publishes it: blocks [E, R, G, 16] of two values a byte, scales [E, R, G] of 2^(scale - 127).

  The weight is [E, 32 G, R]: its last two axes are swapped, as in a file that is not quantised.
  """

  path: Path
  shape: tuple[int, ...]
  blocks: Stored
  scales: Stored
  dtype = 'BF16'  # exact: four bits times a power of two

  def read(self, index: Index = ()) -> np.ndarray:
    """The slice in bfloat16; scale 255 is NaN, as the format has it."""
    (first, last), (top, bottom), rows = slice_bounds(self.shape, index)
    groups = slice(top // GROUP, -(-bottom // GROUP))
    out = np.empty((last - first, bottom - top, rows[1] - rows[0]), DTYPES[self.dtype])
    for e in range(first, last):  # beside the result lies one expert
      at = slice(e, e + 1), slice(*rows), groups
      scales = self.scales.read(at)[0].view(DTYPES['F8_E8M0']).astype(np.float32)
      values = np.take(_FP4, self.blocks.read(at)[0], axis=0)  # [R, G, 16, 2] f32
      values *= scales[..., None, None]
      values = values.reshape(len(scales), scales.shape[1] * GROUP).astype(out.dtype)
      out[e - first] = values[:, top - groups.start * GROUP :][:, : bottom - top].T
    return out


def unquantised(
  stored: Mapping[str, Stored], block: tuple[int, int]
) -> dict[str, Stored | ScaledBlocks | PackedFP4]:
  """The tensors with every weight whole; ConfigError where a part of one is missing or has another shape."""
  found: dict[str, Stored | ScaledBlocks | PackedFP4] = dict(stored)
  for name, tensor in stored.items():
    if tensor.dtype == 'F8_E4M3':
      _expect(tensor, len(tensor.shape) == 2, 'a weight of two axes')
      shape = tuple(-(-n // size) for n, size in zip(tensor.shape, block))
      scale = _part(stored, tensor, f'{name}_scale_inv', 'F32', shape)
      del found[scale.name]
      found[name] = ScaledBlocks(tensor.path, tensor.shape, tensor, scale, block)
    elif tensor.dtype == 'U8' and name.endswith('_blocks'):
      _expect(
        tensor,
        len(tensor.shape) == 4 and tensor.shape[3] * 2 == GROUP,
        'U8 (experts, rows, groups, 16)',
      )
      whole = name.removesuffix('_blocks')
      scales = _part(stored, tensor, f'{whole}_scales', 'U8', tensor.shape[:3])
      _expect(tensor, whole not in stored, f'no {whole!r} beside it')
      e, rows, groups = scales.shape
      del found[name], found[scales.name]
      found[whole] = PackedFP4(tensor.path, (e, groups * GROUP, rows), tensor, scales)
  return found


def _part(
  stored: Mapping[str, Stored], of: Stored, name: str, dtype: str, shape: tuple[int, ...]
) -> Stored:
  if name not in stored:
    raise bad_file(
      of.path, f'{name!r} {dtype} {shape}, the scales of {of.name!r}', 'no such tensor'
    )
  _expect(
    stored[name], (stored[name].dtype, stored[name].shape) == (dtype, shape), f'{dtype} {shape}'
  )
  return stored[name]


def _expect(tensor: Stored, holds: bool, expected: str) -> None:
  if not holds:
    raise bad_file(tensor.path, f'{tensor.name!r}: {expected}', f'{tensor.dtype} {tensor.shape}')
