"""Softmax attention by the kernel that JAX has for TPUs: a block of scores at a time.

The scores of all tokens never lie in memory. A kernel is not divided over a mesh by the compiler:
each device calls it on its own rows and heads.

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S sequence, H heads, J key-value heads, d width of q and k, v of a value.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from moejax.sharding.logical_axes import RULES, platform, row_shards, spec

BLOCKS = (512, 256, 128)  # queries, and keys, at a time


def supports(q_BSHd: Array, k_BSJd: Array) -> bool:
  """Whether the kernel can do these: whole blocks, and rows and heads that divide over the mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  head_shards = math.prod(sizes[axis] for axis in RULES['heads'] if axis in sizes)
  rows, length = q_BSHd.shape[:2]
  # H is a multiple of J, so key-value heads are the ones to ask for.
  return not (length % BLOCKS[-1] or rows % row_shards() or k_BSJd.shape[2] % head_shards)


def splash(
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  window: int,
  scale: float,
  sinks: Array | None,
) -> Array:
  """Attends by the kernel, each device for its own rows and heads; `supports` must have said yes.

  The scale goes into q, which rounds it where q is in half precision.
  """
  on_own = functools.partial(on_one_device, window=window)
  q_BSHd = q_BSHd * jnp.asarray(scale, q_BSHd.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return on_own(q_BSHd, k_BSJd, v_BSJv, segments_BS, sinks)
  heads, sinks_spec = spec('batch', '', 'heads', ''), PartitionSpec(spec('heads')[0])
  # Kernels do not say over which axes their results vary, so it cannot be checked.
  return jax.shard_map(
    on_own,
    in_specs=(heads, heads, heads, spec('batch', ''), sinks_spec),
    out_specs=heads,
    check_vma=False,
  )(q_BSHd, k_BSJd, v_BSJv, segments_BS, sinks)


def on_one_device(
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  sinks: Array | None,
  window: int,
) -> Array:
  """Calls the kernel on the rows and heads of one device. [B, S, H, v]."""
  # Importing them takes a tenth of a second, which only those pay who call them.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, heads = q_BSHd.shape[1:3]
  block = next(size for size in BLOCKS if length % size == 0)
  if window:
    mask = masks.LocalMask((length, length), (window - 1, 0), 0)
  else:
    mask = masks.CausalMask((length, length))
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    # One size for all eight: queries, keys and keys in memory, of the forward and backward kernels.
    block_sizes=kernels.BlockSizes(*[block] * 8),
    head_shards=1,
    q_seq_shards=1,
    interpret=platform() != 'tpu',
  )

  def attend_row(q_HSd: Array, k_JSd: Array, v_JSv: Array, segments_S: Array) -> Array:
    return kernel(q_HSd, k_JSd, v_JSv, kernels.SegmentIds(segments_S, segments_S), sinks)

  # The kernel wants heads before tokens, and one row.
  q_BHSd, k_BJSd, v_BJSv = (a.swapaxes(1, 2) for a in (q_BSHd, k_BSJd, v_BSJv))
  y_BHSv = jax.vmap(attend_row)(q_BHSd, k_BJSd, v_BJSv, segments_BS)
  return y_BHSv.swapaxes(1, 2)
