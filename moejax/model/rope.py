"""Rotary position embedding: positions enter attention by rotating pairs of channels of q and k.

Letters: B batch, S sequence, H heads, d head width, r the part of it that is rotated.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import at_least, check, not_finite, problem_if
from moejax.config.decimals import decimal_of


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN (Peng et al. 2023): lets a model read texts longer than those that it was trained on.

  factor: how many times as long as `original_length` texts may be; 1: off.
  original_length: tokens of the texts that the model was trained on.
  beta_fast, beta_slow: pairs that turn more than beta_fast times within original_length keep their
    speed, those that turn less than beta_slow times are slowed down by `factor`; between lies a
    ramp.
  mscale, mscale_all_dim, attention_factor: read by the functions `attention_factor` and
    `softmax_factor`.
  truncate: the ends of the ramp are rounded outwards to whole pairs.
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
    check(*not_finite(self))
    check(
      *at_least(1, self, 'factor', meaning='off'),
      *at_least(1, self, 'original_length'),
      problem_if(
        not 0 < self.beta_slow <= self.beta_fast,
        f'beta_slow={self.beta_slow}: use a number above 0, at most beta_fast={self.beta_fast}',
      ),
      *at_least(0, self, 'mscale', 'mscale_all_dim', 'attention_factor', meaning='off'),
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """How positions enter a query or a key.

  theta: the base of the wavelengths (Su et al. 2021 use 10 000).
  fraction: how much of a head is rotated, its first channels; the others carry no position.
  interleaved: pairs are the channels (2i, 2i + 1), as in the paper, and not (i, i + r/2).
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  interleaved: bool = False
  yarn: YarnConfig = YarnConfig()

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      problem_if(not self.theta > 1, f'theta={self.theta}: use a number above 1'),
      problem_if(
        not 0 < self.fraction <= 1, f'fraction={self.fraction}: use a number above 0, at most 1'
      ),
    )


def rotated_width(width: int, cfg: RopeConfig) -> int:
  """Returns r, how many of a head's channels are rotated: floor(fraction * d)."""
  return math.floor(decimal_of(cfg.fraction) * width)


def yarn_ramp(dim: int, cfg: RopeConfig) -> np.ndarray:
  """Says how far each pair is slowed down: 0 not at all, 1 by `factor`. [dim/2] f32."""
  yarn = cfg.yarn

  def pair_that_turns(times: float) -> float:
    # Within the original length, as a real number: wavelengths grow by theta^(2/dim) a pair.
    longest = yarn.original_length / (times * 2 * math.pi)
    return dim * math.log(longest) / (2 * math.log(cfg.theta))

  low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001  # as published; only keeps the division defined
  return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1).astype(np.float32)


def inverse_frequencies(dim: int, cfg: RopeConfig) -> Array:
  """Returns radians a position of each pair i: `theta^(-2i/dim)`, slowed by YaRN. [dim/2] f32."""
  plain = cfg.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if cfg.yarn.factor == 1:
    return plain
  ramp = yarn_ramp(dim, cfg)
  return plain / cfg.yarn.factor * ramp + plain * (1 - ramp)


def magnitude(factor: float, scale: float) -> float:
  """m(scale) = 0.1 scale ln(factor) + 1, by which YaRN scales logits for longer texts."""
  return 0.1 * scale * math.log(factor) + 1


def attention_factor(cfg: RopeConfig) -> float:
  """Returns what cos and sin are multiplied by, of q and of k.

  That is yarn.attention_factor where it is given; else m(mscale) / m(mscale_all_dim) where both are
  given; else m(1).
  """
  yarn = cfg.yarn
  if yarn.attention_factor:
    return yarn.attention_factor
  if yarn.mscale and yarn.mscale_all_dim:
    return magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
  return magnitude(yarn.factor, 1.0)


def softmax_factor(cfg: RopeConfig) -> float:
  """Returns what the softmax's scale is multiplied by: m(mscale_all_dim)^2, 1 where that is 0."""
  return magnitude(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2


def rotate(x: Array, positions: Array, cfg: RopeConfig) -> Array:
  """Rotates pairs of channels by `position * inverse_frequency` (Su et al. 2021, eq. 34).

  Args:
    x: [B, S, H, d], of which the first r = cfg.fraction d channels are rotated.
    positions: [B, S] i32, restarting with each document, so that packing changes nothing.

  Returns:
    [B, S, H, d] in the dtype of x. Interleaved pairs come back as halves, (0, 2, ..., 1, 3, ...):
    q and k alike, so that no product of the two sees it.
  """
  width = rotated_width(x.shape[-1], cfg)
  turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
  # In float32, since bfloat16 cannot count past 256.
  angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(width, cfg)  # [B, S, r/2]
  factor = attention_factor(cfg)
  # One angle for all heads.
  cos = (factor * jnp.cos(angles))[:, :, None, :]
  sin = (factor * jnp.sin(angles))[:, :, None, :]
  if cfg.interleaved:
    first, second = turned[..., 0::2], turned[..., 1::2]
  else:
    first, second = jnp.split(turned, 2, axis=-1)
  # Rounded once, here: cosines, products and sums in bfloat16 would each be rounded.
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*(half.astype(x.dtype) for half in turned), rest], axis=-1)
