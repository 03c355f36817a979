"""Rotary position embedding: positions enter attention by rotating pairs of channels of q and k.

Letters: B batch, S sequence, H heads, d head width, r the part of it that is rotated.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import check


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN (Peng et al. 2023): a model trained at `original_length` reads texts `factor` times as long; 1 is off.

  beta_fast, beta_slow: pairs that turn more than beta_fast times within original_length keep their speed, those that
    turn less than beta_slow times are slowed down by `factor`; between lies a ramp, with whole ends if `truncate`.
  mscale, mscale_all_dim, attention_factor: read by the functions `attention_factor` and `softmax_factor`.
  """

  factor: float = 1.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 0.0
  mscale_all_dim: float = 0.0
  attention_factor: float = 0.0
  truncate: bool = True

  def __post_init__(self) -> None:
    check(
      f'factor={self.factor}: use 1 (off) or more' if not self.factor >= 1 else '',
      f'original_length={self.original_length}: use 1 or more' if self.original_length < 1 else '',
      f'beta_slow={self.beta_slow}: use a number above 0, at most beta_fast={self.beta_fast}'
      if not 0 < self.beta_slow <= self.beta_fast
      else '',
      *(
        f'{name}={value}: use 0 (off) or more'
        for name, value in (
          ('mscale', self.mscale),
          ('mscale_all_dim', self.mscale_all_dim),
          ('attention_factor', self.attention_factor),
        )
        if not value >= 0
      ),
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """`theta` is the base of the wavelengths (Su et al. 2021 use 10 000).

  fraction: how much of a head is rotated, its first channels; the others carry no position.
  interleaved: pairs are the channels (2i, 2i + 1), as in the paper, and not (i, i + r/2).
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  interleaved: bool = False
  yarn: YarnConfig = YarnConfig()

  def __post_init__(self) -> None:
    check(
      f'theta={self.theta}: use a number above 1' if not self.theta > 1 else '',
      f'fraction={self.fraction}: use a number above 0, at most 1'
      if not 0 < self.fraction <= 1
      else '',
    )


def slowed(dim: int, cfg: RopeConfig) -> np.ndarray:
  """How far each pair is slowed down: 0 not at all, 1 by `factor`. [dim/2] f32."""
  # The pair, as a real number, that turns so many times within the original length.
  low, high = (
    dim * math.log(cfg.yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))
    for turns in (cfg.yarn.beta_fast, cfg.yarn.beta_slow)
  )
  if cfg.yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  high += 0.001 if low == high else 0.0  # as published; only keeps the division defined
  return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1).astype(np.float32)


def inverse_frequencies(dim: int, cfg: RopeConfig) -> Array:
  """`theta^(-2i/dim)` for i in [0, dim/2), slowed down by YaRN: radians a position, one for each pair. [dim/2] f32."""
  plain = cfg.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if cfg.yarn.factor == 1:
    return plain
  ramp = slowed(dim, cfg)
  return plain / cfg.yarn.factor * ramp + plain * (1 - ramp)


def magnitude(factor: float, scale: float) -> float:
  """m(scale) = 0.1 scale ln(factor) + 1, by which YaRN scales logits for longer texts."""
  return 0.1 * scale * math.log(factor) + 1


def attention_factor(cfg: RopeConfig) -> float:
  """What cos and sin are multiplied by, of q and of k: m(mscale) / m(mscale_all_dim) if both are given, else m(1)."""
  yarn = cfg.yarn
  over, under = (
    (yarn.mscale, yarn.mscale_all_dim) if yarn.mscale and yarn.mscale_all_dim else (1.0, 0.0)
  )
  return yarn.attention_factor or magnitude(yarn.factor, over) / magnitude(yarn.factor, under)


def softmax_factor(cfg: RopeConfig) -> float:
  """What the scale of the softmax is multiplied by: m(mscale_all_dim)^2, which is 1 where that is 0."""
  return magnitude(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2


def rotate(x: Array, positions: Array, cfg: RopeConfig) -> Array:
  """Rotates pairs of channels by `position * inverse_frequency` (Su et al. 2021, eq. 34).

  Args:
    x: [B, S, H, d], of which the first r = cfg.fraction d channels are rotated.
    positions: [B, S] i32, restarting with each document, so that packing changes nothing.

  Returns:
    [B, S, H, d] in the dtype of x; angles are computed in float32, since bfloat16 cannot count past 256. Interleaved
    pairs come back as halves, (0, 2, ..., 1, 3, ...): q and k alike, so that no product of the two sees it.
  """
  width = int(x.shape[-1] * cfg.fraction)
  x, rest = x[..., :width], x[..., width:]
  angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(width, cfg)  # [B, S, r/2]
  cos, sin = (
    (attention_factor(cfg) * f(angles))[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin)
  )
  first, second = (x[..., 0::2], x[..., 1::2]) if cfg.interleaved else jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
