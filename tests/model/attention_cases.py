"""Attention layers of every kind with drawn parameters, and the rows of tokens that they run."""

import dataclasses
import functools

import jax
import numpy as np

from moejax.model.attention import Attention, LatentAttention, make_attention
from moejax.model.config import AttentionConfig, LatentConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.sharding.params import is_param
from tests.support.quick import QUICK

B, S, WIDTH, H, D = 2, 36, 16, 4, 6
EPS = 0.5  # of the model's norms: large enough to be seen
# Row 0: two documents and padding behind; row 1: padding in front, and one document.
SEGMENTS = np.array([[1] * 15 + [2] * 18 + [0] * 3, [0] * 3 + [1] * 33], np.int32)
REAL = SEGMENTS > 0
YARN = YarnConfig(4.0, 64, mscale=0.7, mscale_all_dim=1.0)
# Every field is somewhere other than its default; together they are what the published families are
# made of.
CONFIGS = {
  'grouped': AttentionConfig(H, 2, D, RopeConfig(100.0)),
  'multi-query, norm of heads': AttentionConfig(
    H, 1, 8, RopeConfig(100.0, 0.5, interleaved=True), windows=(4,), qk_norm='head', qkv_bias=True
  ),
  'norm of projections, clip': AttentionConfig(
    2, 2, D, RopeConfig(100.0), qk_norm='projection', clip_qkv=0.8
  ),
  'sinks': AttentionConfig(
    H,
    2,
    D,
    RopeConfig(100.0, yarn=dataclasses.replace(YARN, truncate=False)),
    windows=(3,),
    qkv_bias=True,
    out_bias=True,
    sinks=True,
  ),
  'latent': AttentionConfig(
    H, H, D, RopeConfig(100.0), windows=(5,), latent=LatentConfig(10, 0, 4, 3, 0.2)
  ),
  'latent queries': AttentionConfig(
    2,
    2,
    D,
    RopeConfig(100.0, interleaved=True, yarn=YARN),
    qkv_bias=True,
    out_bias=True,
    latent=LatentConfig(10, 8, 4, 8, 0.2),
  ),
}
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(B, S, WIDTH)).astype(np.float32) for _ in range(2))
DY *= REAL[..., None]


def positions_of(segments: np.ndarray) -> np.ndarray:
  """Of each token in its document, and of padding in its run."""
  positions = np.zeros_like(segments)
  for i in range(1, segments.shape[1]):
    positions[:, i] = np.where(segments[:, i] == segments[:, i - 1], positions[:, i - 1] + 1, 0)
  return positions


POSITIONS = positions_of(SEGMENTS)


@functools.cache
def layer(name: str) -> Attention | LatentAttention:
  """Norms, biases and sinks are drawn as well: where they start, nobody would see them."""
  rng = np.random.default_rng(1)

  def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    mean = 1.0 if shape.ndim == 1 else 0.0
    return rng.normal(mean, 0.5, shape.shape).astype(np.float32)

  return jax.tree.map(draw, layer_shapes(CONFIGS[name]))


def layer_shapes(cfg: AttentionConfig) -> Attention | LatentAttention:
  """The layer of a config, of shapes instead of arrays."""
  return jax.eval_shape(
    lambda key: make_attention(key, WIDTH, cfg, EPS, 1.0, 1.0), jax.random.key(0)
  )


def window(name: str) -> int:
  """The one window of the layer."""
  return CONFIGS[name].windows[0]


def weights(layer: Attention | LatentAttention) -> dict[str, np.ndarray]:
  """The parameters by their paths, as the oracle names them."""
  parameters = jax.tree_util.tree_flatten_with_path(layer, is_leaf=is_param)[0]
  named = {}
  for path, parameter in parameters:
    name = '.'.join(str(key.key if hasattr(key, 'key') else key.name) for key in path)
    named[name] = np.asarray(parameter[...], np.float64)
  return named


@functools.partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def run(
  layer: Attention | LatentAttention, x: jax.Array, dy: jax.Array, window: int
) -> tuple[jax.Array, tuple[Attention | LatentAttention, jax.Array]]:
  """y, and the gradients of y · dy to the layer and to x."""
  y, back = jax.vjp(lambda layer, x: layer(x, SEGMENTS, POSITIONS, window)[0], layer, x)
  return y, back(dy)


@functools.cache
def output_of(name: str) -> np.ndarray:
  """What the layer gives for X."""
  return np.asarray(run(layer(name), X, DY, window(name))[0])
