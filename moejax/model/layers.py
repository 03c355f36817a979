"""The plainest layers: a matrix, a norm, and the embedding of tokens.

Parameters are float32 always; each layer computes in the dtype of the `x` it is given, except where
it says otherwise. The last axis of a vector (a norm's scale, a bias, a sink) is `norm`: on every
device, and not decayed.

Letters: B batch, S sequence, D model, V vocab.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.moe.experts.ffn import matmul
from moejax.sharding.logical_axes import constrain
from moejax.sharding.params import constant_init, normal_init, param


class Linear(nnx.Module):
  """`x @ w`, or `x @ w + b`.

  shape: of w, inputs first; `axes` are its logical axes.
  std: standard deviation of w at the start; b starts at 0.
  """

  def __init__(
    self, key: Array, shape: tuple[int, int], axes: tuple[str, str], std: float, bias: bool = False
  ) -> None:
    self.w = param(key, shape, axes, normal_init(std))
    self.b = param(key, shape[1:], ('norm',), constant_init(0.0)) if bias else None

  def __call__(self, x: Array) -> Array:
    y = matmul(x, self.w[...])
    return y if self.b is None else y + self.b[...].astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """`scale * x / rms(x)` over the last axis, in float32 inside, in the dtype of `x` outside."""
  # In bfloat16 a mean of squares would be off by 2^-9.
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return scale.astype(x.dtype) * (x32 * inverse).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a learnt scale (Zhang & Sennrich 2019)."""

  def __init__(self, key: Array, dim: int, eps: float, gain: float = 1.0) -> None:
    self.eps = eps
    self.scale = param(key, (dim,), ('norm',), constant_init(gain))

  def __call__(self, x: Array) -> Array:
    return rms_norm(x, self.scale[...], self.eps)


class Embed(nnx.Module):
  """Token ids to vectors. A gather, never a one-hot matmul: that is V times the work."""

  def __init__(self, key: Array, vocab_size: int, d_model: int, std: float) -> None:
    self.table = param(key, (vocab_size, d_model), ('vocab', 'embed'), normal_init(std))

  def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:  # [B, S] i32 -> [B, S, D]
    # Gathered whole over `embed` first: rows looked up from a split table would come back split,
    # and be moved again.
    return constrain(self.table[...].astype(dtype), 'vocab', '')[tokens]
