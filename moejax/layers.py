"""The Flax that most files need: a parameter with logical axes, and the four plainest layers.

Parameters are float32 always; each layer computes in the dtype of the `x` it is given, except where it says otherwise.

Letters: B batch, S sequence, D model, F FFN hidden, V vocab.
"""

from collections.abc import Callable

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from moejax.sharding import constrain

Init = Callable[[Array, tuple[int, ...]], Array]


def normal(std: float) -> Init:
  """Normal of mean 0 and the given standard deviation."""
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
  """For the scale of a norm."""
  del key
  return jnp.ones(shape, jnp.float32)


def param(key: Array, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> nnx.Param:
  """A float32 parameter that knows its logical axes; `moejax.sharding.RULES` says where they lie."""
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(key, shape), axes=axes)


def matmul(x: Array, w: Array) -> Array:
  """`x @ w` in the dtype of x, over a flat list of tokens. [..., D], [D, F] -> [..., F].

  XLA's CPU backend takes two to three times as long for the weight's gradient when tokens lie in two axes.
  """
  return (x.reshape(-1, x.shape[-1]) @ w.astype(x.dtype)).reshape(*x.shape[:-1], w.shape[1])


class Linear(nnx.Module):
  """`x @ w`, without bias."""

  def __init__(self, key: Array, shape: tuple[int, int], axes: tuple[str, str], std: float) -> None:
    self.w = param(key, shape, axes, normal(std))

  def __call__(self, x: Array) -> Array:
    return matmul(x, self.w[...])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """`scale * x / rms(x)` over the last axis, in float32 inside, in the dtype of `x` outside."""
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return scale.astype(x.dtype) * (x32 * inverse).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a learnt scale (Zhang & Sennrich 2019)."""

  def __init__(self, key: Array, dim: int, eps: float) -> None:
    self.eps = eps
    self.scale = param(key, (dim,), ('norm',), ones)

  def __call__(self, x: Array) -> Array:
    return rms_norm(x, self.scale[...], self.eps)


def swiglu(gate: Array, up: Array) -> Array:
  """`silu(gate) * up`, from the two pre-activations."""
  return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
  """`down(silu(gate x) * up x)` (Shazeer 2020): the FFN of dense layers, and of the shared experts."""

  def __init__(self, key: Array, d_model: int, d_ff: int, std: float) -> None:
    keys = jax.random.split(key, 3)
    self.gate = param(keys[0], (d_model, d_ff), ('embed', 'mlp'), normal(std))
    self.up = param(keys[1], (d_model, d_ff), ('embed', 'mlp'), normal(std))
    self.down = param(keys[2], (d_ff, d_model), ('mlp', 'embed'), normal(std))

  def __call__(self, x: Array) -> Array:  # [B, S, D] -> [B, S, D]
    gate, up, down = (w[...] for w in (self.gate, self.up, self.down))
    hidden = constrain(swiglu(matmul(x, gate), matmul(x, up)), 'batch', 'sequence', 'mlp')
    return matmul(hidden, down)


class Embed(nnx.Module):
  """Token ids to vectors. A gather, never a one-hot matmul: that is V times the work."""

  def __init__(self, key: Array, vocab_size: int, d_model: int, std: float) -> None:
    self.table = param(key, (vocab_size, d_model), ('vocab', 'embed'), normal(std))

  def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:  # [B, S] i32 -> [B, S, D]
    # Gathered whole over `embed` first: rows looked up from a split table would come back split, and be moved again.
    return constrain(self.table[...].astype(dtype), 'vocab', '')[tokens]
