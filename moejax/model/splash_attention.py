"""Softmax attention by the kernel that JAX has for TPUs: a block of scores at a time.

The scores of all tokens never lie in memory. A kernel is not divided over a mesh by the compiler:
each device calls it on its own rows and heads.

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S sequence, H heads, J key-value heads, d width of q and k, v of a value.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model.device_attention import attend_on_each_device, rows_and_heads_divide
from moejax.model.remat import ATTENTION
from moejax.sharding.logical_axes import platform

BLOCKS = (512, 256, 128)  # queries, and keys, at a time


def supports(q_BSHd: Array, k_BSJd: Array) -> bool:
  """Whether the kernel can do these: whole blocks, and rows and heads that divide over the mesh."""
  return q_BSHd.shape[1] % BLOCKS[-1] == 0 and rows_and_heads_divide(q_BSHd, k_BSJd)


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
  kernel = functools.partial(on_one_device, window=window)
  q_BSHd = q_BSHd * jnp.asarray(scale, q_BSHd.dtype)
  return attend_on_each_device(kernel, q_BSHd, k_BSJd, v_BSJv, segments_BS, sinks=sinks)


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
    residual_checkpoint_name=ATTENTION,  # its output and logsumexp, see remat.py
    interpret=platform() != 'tpu',
  )

  def attend_row(q_HSd: Array, k_JSd: Array, v_JSv: Array, segments_S: Array) -> Array:
    return kernel(q_HSd, k_JSd, v_JSv, kernels.SegmentIds(segments_S, segments_S), sinks)

  # The kernel wants heads before tokens, and one row.
  q_BHSd, k_BJSd, v_BJSv = (a.swapaxes(1, 2) for a in (q_BSHd, k_BSJd, v_BSJv))
  y_BHSv = jax.vmap(attend_row)(q_BHSd, k_BJSd, v_BJSv, segments_BS)
  return y_BHSv.swapaxes(1, 2)
