"""Softmax attention by the kernel that JAX has for TPUs: scores are made a block at a time, and never lie in memory.

A kernel is not divided over a mesh by the compiler: each device calls it on its own rows and heads.

Letters: B batch, S sequence, H heads, J key-value heads, d width of q and k, v of a value.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from moejax.sharding.logical_axes import RULES, platform, row_shards, spec

BLOCKS = (512, 256, 128)  # queries, and keys, at a time


def supports(q: Array, k: Array) -> bool:
  """Whether the kernel can do these: whole blocks, and rows and heads that divide over the mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  head_shards = math.prod(sizes[axis] for axis in RULES['heads'] if axis in sizes)
  return not (q.shape[1] % BLOCKS[-1] or q.shape[0] % row_shards() or k.shape[2] % head_shards)


def splash(
  q: Array, k: Array, v: Array, segments: Array, window: int, scale: float, sinks: Array | None
) -> Array:
  """A row of ATTENTIONS. The scale goes into q, which rounds it where q is in half precision."""
  own = functools.partial(on_one_device, window=window)
  q = q * jnp.asarray(scale, q.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return own(q, k, v, segments, sinks)
  heads = spec('batch', '', 'heads', '')
  # Kernels do not say over which axes their results vary, so it cannot be checked.
  return jax.shard_map(
    own,
    in_specs=(heads, heads, heads, spec('batch', ''), PartitionSpec(spec('heads')[0])),
    out_specs=heads,
    check_vma=False,
  )(q, k, v, segments, sinks)


def on_one_device(
  q: Array, k: Array, v: Array, segments: Array, sinks: Array | None, window: int
) -> Array:
  """q [B, S, H, d], k [B, S, J, d], v [B, S, J, v] -> [B, S, H, v]."""
  length = q.shape[1]
  block = next(size for size in BLOCKS if length % size == 0)
  mask = (
    masks.LocalMask((length, length), (window - 1, 0), 0)
    if window
    else masks.CausalMask((length, length))
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * q.shape[2]),
    block_sizes=kernels.BlockSizes(*[block] * 8),
    head_shards=1,
    q_seq_shards=1,
    interpret=platform() != 'tpu',
  )

  def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return kernel(q, k, v, kernels.SegmentIds(segments, segments), sinks)

  y = jax.vmap(row)(*(a.swapaxes(1, 2) for a in (q, k, v)), segments)  # [B, H, S, v]
  return y.swapaxes(1, 2)
