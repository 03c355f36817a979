"""How blocks start, and who reaches whom through them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.config import (
  InitConfig,
)
from moejax.model.transformer import Transformer
from moejax.moe.dispatch.dispatchers import DispatchConfig
from tests.model.transformer_cases import (
  BATCH,
  CONFIG,
  REAL,
  RNG,
  SEGMENTS,
  TOKENS,
  B,
  D,
  S,
  V,
  biases,
  forward,
  model_of,
  output_of,
  replace,
)
from tests.support.quick import QUICK


@pytest.mark.slow
def test_depth_scaled_norms_and_tiny_weights_at_the_start() -> None:
  """Post-norms at c / sqrt(L), weights of TinyInit, and, where rule='depth', what writes to the
  residual narrower by sqrt(2 L)."""

  def made(init: InitConfig, **changes: object) -> Transformer:
    cfg = replace(d_model=64, init=init, **changes)
    return jax.jit(lambda key: Transformer(key, cfg), compiler_options=QUICK)(jax.random.key(0))

  tiny = made(
    InitConfig(rule='tiny', embed_std=0.5, attention_gain=0.283, ffn_gain=0.432), sandwich_norm=True
  )
  for block, ffn in ((tiny.dense_blocks, 'ffn_post_norm'), (tiny.blocks, 'moe_post_norm')):
    np.testing.assert_allclose(block.attention_post_norm.scale[...], 0.283 / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(getattr(block, ffn).scale[...], 0.432 / 3**0.5, rtol=1e-6)
  for w in (tiny.blocks.moe.experts.down, tiny.blocks.attention.q.w, tiny.head.w):
    np.testing.assert_allclose(np.std(w), (2 * 64 * 3) ** -0.5, rtol=0.1)
  np.testing.assert_allclose(np.std(tiny.embed.table), 0.5, rtol=0.1)
  deep = made(InitConfig(0.3, 'depth'))
  for narrow, wide in (
    (deep.blocks.attention.out.w, deep.blocks.attention.q.w),
    (deep.dense_blocks.ffn.down, deep.dense_blocks.ffn.up),
    (deep.blocks.moe.shared.down, deep.blocks.moe.shared.up),
    (deep.blocks.moe.experts.down, deep.blocks.moe.experts.up),
  ):
    np.testing.assert_allclose(np.std(narrow) * 6**0.5, 0.3, rtol=0.15)
    np.testing.assert_allclose(np.std(wide), 0.3, rtol=0.15)


def test_layers_differ_from_each_other() -> None:
  made = jax.jit(lambda key: Transformer(key, CONFIG), compiler_options=QUICK)(jax.random.key(0))
  for w in (made.blocks.moe.experts.gate, made.blocks.attention.q.w):
    assert not np.allclose(w[0], w[1]) and abs(np.std(w) - CONFIG.init.std) < 0.05


@pytest.mark.parametrize(
  'dispatcher', ['dense_matmul', pytest.param('sparse_matmul', marks=pytest.mark.slow)]
)
def test_a_token_reaches_later_ones_of_its_document_and_nobody_else(dispatcher: str) -> None:
  """By gradient, exactly 0 or not: of each place's output to the embedding of each token."""
  cfg = replace(moe=dataclasses.replace(CONFIG.moe, dispatch=DispatchConfig(dispatcher)))
  direction = RNG(2).normal(size=(B, S, D)).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def reach(model: Transformer) -> jax.Array:
    def one(place: jax.Array) -> jax.Array:
      def output(table: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda a: a, model)
        moved.embed.table[...] = table
        return (moved(BATCH, biases(cfg)).hidden * direction).reshape(B * S, D)[place].sum()

      return jax.grad(output)(model.embed.table[...])[TOKENS.ravel()].any(-1)

    return jax.lax.map(one, jnp.arange(B * S))

  reached = np.asarray(reach(model_of(cfg))).reshape(B, S, B, S)
  want = np.zeros_like(reached)
  for b, s, t in np.ndindex(B, S, S):
    want[b, s, b, t] = t <= s and SEGMENTS[b, s] == SEGMENTS[b, t]
  np.testing.assert_array_equal(reached[REAL], want[REAL])


@pytest.mark.parametrize('dispatcher', ['dense_matmul', 'sparse_matmul'])
def test_other_tokens_later_or_in_other_documents_change_nothing(dispatcher: str) -> None:
  """By perturbation: it also sees a leak through the choice of experts, which has no gradient."""
  cfg = replace(moe=dataclasses.replace(CONFIG.moe, dispatch=DispatchConfig(dispatcher)))
  before = np.asarray(output_of(cfg).hidden)
  for b, at in np.ndindex(B, S):
    tokens = TOKENS.copy()
    tokens[b, at] = (tokens[b, at] + 7) % V
    after = forward(model_of(cfg), BATCH._replace(tokens=tokens), biases(cfg)).hidden
    moved = np.abs(np.asarray(after) - before).max(-1) > 1e-5
    want = np.zeros_like(moved)
    want[b, at:] = SEGMENTS[b, at:] == SEGMENTS[b, at]
    np.testing.assert_array_equal(moved[REAL], want[REAL], err_msg=f'{b=} {at=}')
