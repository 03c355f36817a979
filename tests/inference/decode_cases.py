"""Small models of every kind, prompts, and decoding with and without a cache."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.batch import make_batch
from moejax.inference import sampling
from moejax.inference.draw import SamplingParams
from moejax.inference.sampling import (
  SampleConfig,
)
from moejax.model.config import AttentionConfig, InitConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.model.transformer import Transformer
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import SELECTIONS
from tests.support.quick import QUICK

V, E = 24, 4
GREEDY = SampleConfig(max_tokens=24, temperature=0.0)
# Below, at and above what prompts are rounded up to; the longest leaves no slot to padding.
PROMPTS = [[1, 2, 3], [*range(24)][::-1], [7], [5, 11, 5, 11, 5, 11, 5, 11], [3, 1]]
MOE = MoEConfig(RouterConfig(E, 2), d_expert=8)
YARN = YarnConfig(4.0, 8, mscale=0.7, mscale_all_dim=1.3)
BASE = ModelConfig(
  vocab_size=V,
  d_model=16,
  num_layers=2,
  d_ff=16,
  init=InitConfig(0.5),
  moe=MOE,
  attention=AttentionConfig(2, 1, 8),
)
# Each with what its kind of published model has.
KINDS = {
  'grouped': dataclasses.replace(
    BASE,
    num_dense_layers=1,
    mtp_depth=1,
    tie_embeddings=True,
    sandwich_norm=True,
    attention=AttentionConfig(2, 1, 8, RopeConfig(fraction=0.5), qk_norm='head', qkv_bias=True),
  ),
  'windows and sinks': dataclasses.replace(
    BASE,
    num_layers=3,
    mtp_depth=3,
    attention=AttentionConfig(
      4,
      2,
      8,
      windows=(4, 0),
      sinks=True,
      qkv_bias=True,
      out_bias=True,
      rope=RopeConfig(yarn=dataclasses.replace(YARN, truncate=False)),
    ),
    moe=MoEConfig(
      RouterConfig(E, 2, weigh='softmax', logit_bias=True),
      d_expert=8,
      activation='clamped_swiglu',
      expert_bias=True,
    ),
  ),
  'latent': dataclasses.replace(
    BASE,
    num_layers=4,
    num_dense_layers=1,
    ffn_pattern=('moe', 'dense'),
    mtp_depth=2,
    attention=AttentionConfig(
      2,
      2,
      8,
      RopeConfig(interleaved=True, yarn=YARN),
      windows=(3, 0),
      latent=LatentConfig(6, 10, 4, 8),
    ),
    moe=MoEConfig(
      RouterConfig(E, 2, 'sigmoid', num_groups=2, scale=2.5), d_expert=8, num_shared=1, d_shared=6
    ),
  ),
}
# Every selection that is causal and does not look at scores alone.
for selection in sorted(SELECTIONS):
  if SELECTIONS[selection].causal and selection != 'top_k':
    router = RouterConfig(E, 1, 'sigmoid', renormalise=False, selection=selection)
    KINDS[selection] = dataclasses.replace(
      BASE, num_layers=1, mtp_depth=1, moe=MoEConfig(router, d_expert=8)
    )
# As parameters of a test: compiling is all the time, and one kind is enough for the fast tests.
SOME_OR_ALL = [
  kind if kind == 'uniform' else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
]


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """A model of random numbers that follow from a parameter's name, vectors as well.

  They are large enough for texts that go on. The depths read the token ahead most, as the model
  does: they draft right at times.
  """

  def draw_parameter(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if 'scale' in name:
      return rng.uniform(0.7, 1.5, a.shape).astype(a.dtype)
    numbers = rng.normal(scale=0.3 if 'mtp' in name else 0.5, size=a.shape)
    if 'projection' in name:
      numbers += 2 * np.eye(*a.shape[-2:])
    return numbers.astype(a.dtype)

  shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg))
  return jax.tree_util.tree_map_with_path(draw_parameter, shapes)


def biases(cfg: ModelConfig) -> np.ndarray:
  """The router bias of each layer, large enough to decide something."""
  return np.random.default_rng(1).normal(scale=0.3, size=(cfg.num_moe_layers, E)).astype(np.float32)


def decode_all(
  model: Transformer,
  cfg: SampleConfig,
  prompts: Sequence[Sequence[int]] = PROMPTS,
  ends: tuple[int, ...] = (),
) -> tuple[list[list[int]], list[list[int]]]:
  """What each row says, and how many tokens each step gave each row."""
  steps = list(sampling.decode(model, biases(model.cfg), prompts, cfg, ends))
  said = [sum((new[row] for new in steps), []) for row in range(len(prompts))]
  return said, [[len(tokens) for tokens in new] for new in steps]


@functools.partial(jax.jit, compiler_options=QUICK)
def anew(model: Transformer, tokens: jax.Array, router: jax.Array) -> tuple[jax.Array, ...]:
  """The likeliest token after each, of the model and of each depth.

  Everything is computed at once, without a cache.
  """
  segments = (tokens >= 0).astype(jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  batch = make_batch(jnp.maximum(tokens, 0), segment_ids=segments, positions=positions)
  out = model(batch, router)
  return tuple(model.logits(hidden).argmax(-1) for hidden in (out.hidden, *out.mtp_hidden))


def pad(texts: Sequence[Sequence[int]]) -> np.ndarray:
  """Texts in the length of the longest that there may be, -1 behind."""
  return np.array([[*text, *[-1] * (64 - len(text))] for text in texts], np.int32)


def certain(depth: int) -> Transformer:
  """A model whose next token follows from the last one alone, and depths that know how.

  All branches give 0.
  """
  cfg = dataclasses.replace(BASE, mtp_depth=depth)
  model = jax.tree.map(lambda a: jnp.asarray(a), model_of(cfg))
  for block in (model.blocks, model.mtp.block):
    block.attention.out.w[...] *= 0
    block.moe.experts.down[...] *= 0
  for norm in (model.norm, model.mtp.norm, model.mtp.token_norm):
    norm.scale[...] = 0 * norm.scale[...] + 1
  model.mtp.projection.w[...] = jnp.broadcast_to(jnp.eye(32, 16), model.mtp.projection.w.shape)
  return model


def sampling_params(temperature: float, top_k: int, top_p: float) -> SamplingParams:
  """Of key 0, as arrays."""
  key = jax.random.key(0)
  return SamplingParams(key, jnp.asarray(temperature), jnp.asarray(top_k), jnp.asarray(top_p))
