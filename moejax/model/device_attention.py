"""A kernel of attention under a mesh: each device calls it on its own rows and heads.

The compiler does not divide a kernel over a mesh, or does so only where it is told how.

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S sequence, H heads, J key-value heads, d width of q and k, v of a value.
"""

import math
from typing import Protocol

import jax
from jax import Array
from jax.sharding import PartitionSpec

from moejax.sharding.logical_axes import RULES, row_shards, spec


class Kernel(Protocol):
  """Attention of the rows and heads of one device."""

  def __call__(
    self, q_BSHd: Array, k_BSJd: Array, v_BSJv: Array, segments_BS: Array, sinks: Array | None
  ) -> Array:
    """Returns [B, S, H, v]."""


def head_shards() -> int:
  """Returns into how many pieces the current mesh cuts heads; 1 without a mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[axis] for axis in RULES['heads'] if axis in sizes)


def rows_and_heads_divide(q_BSHd: Array, k_BSJd: Array) -> bool:
  """Whether each device of the current mesh gets as many rows and heads as any other."""
  # H is a multiple of J, so key-value heads are the ones to ask for.
  return not (q_BSHd.shape[0] % row_shards() or k_BSJd.shape[2] % head_shards())


def attend_on_each_device(
  kernel: Kernel,
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  sinks: Array | None,
) -> Array:
  """Calls `kernel` on each device; `rows_and_heads_divide` must have said yes. [B, S, H, v]."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q_BSHd, k_BSJd, v_BSJv, segments_BS, sinks)
  heads, sinks_spec = spec('batch', '', 'heads', ''), PartitionSpec(spec('heads')[0])
  # Kernels do not say over which axes their results vary, so it cannot be checked.
  return jax.shard_map(
    kernel,
    in_specs=(heads, heads, heads, spec('batch', ''), sinks_spec),
    out_specs=heads,
    check_vma=False,
  )(q_BSHd, k_BSJd, v_BSJv, segments_BS, sinks)
