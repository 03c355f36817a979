"""Rotary position embedding: positions enter attention by rotating pairs of channels of q and k.

Letters: B batch, S sequence, H heads, d the rotated width.
"""

import dataclasses

from jax import Array
import jax.numpy as jnp

from moejax.config import check


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """`theta` is the base of the wavelengths (Su et al. 2021 use 10 000)."""

  theta: float = 10_000.0

  def __post_init__(self) -> None:
    check(f'theta={self.theta}: use a number above 1' if self.theta <= 1 else '')


def inverse_frequencies(dim: int, cfg: RopeConfig) -> Array:
  """`theta^(-2i/dim)` for i in [0, dim/2): radians a position, one for each pair of channels. [dim/2] f32."""
  return cfg.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(x: Array, positions: Array, cfg: RopeConfig) -> Array:
  """Rotates the pairs (i, i + d/2) of the last axis by `position * inverse_frequency` (Su et al. 2021, eq. 34).

  Args:
    x: [B, S, H, d].
    positions: [B, S] i32, restarting with each document, so that packing changes nothing.

  Returns:
    [B, S, H, d] in the dtype of x; angles are computed in float32, since bfloat16 cannot count past 256.
  """
  angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(x.shape[-1], cfg)  # [B, S, d/2]
  cos, sin = (f(angles)[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
