"""Layers that scans run: the same as a loop, dense ones between, with windows, and under remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.blocks import Route
from moejax.model.config import ModelConfig
from moejax.model.remat import REMAT_POLICIES
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.selection import Tokens
from tests.model.transformer_cases import (
  BATCH,
  CONFIG,
  REAL,
  SEGMENTS,
  TOKENS,
  B,
  biases,
  differentiate,
  model_of,
  output_of,
  replace,
)
from tests.support.quick import QUICK

# Layers with experts on both sides of a dense one.
IRREGULAR = replace(num_layers=4, num_dense_layers=0, ffn_pattern=('moe', 'dense', 'moe', 'moe'))
# Windows that alternate from the dense layer on: two turns of two layers, and one layer more.
WINDOWED = replace(
  num_layers=6, attention=dataclasses.replace(CONFIG.attention, windows=(2, 0)), unroll=4
)


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def loop(
  model: Transformer, router: jax.Array, windows: tuple[int, ...]
) -> tuple[jax.Array, list[jax.Array]]:
  """The hidden states after the final norm, and the load of each layer with experts."""
  x, loads, dense = model.embed(TOKENS, jnp.float32), [], 0
  for layer, has_experts in enumerate(model.cfg.has_experts):
    window = windows[layer % len(windows)]
    if has_experts:
      i = len(loads)
      block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
      tokens = Tokens(TOKENS, REAL, SEGMENTS, jnp.arange(B))
      x, _, aux = block(x, BATCH, window, None, Route(router[i], tokens, None))
      loads.append(aux.load)
    else:
      x, _ = jax.tree.map(lambda a, i=dense: a[i], model.dense_blocks)(x, BATCH, window, None)
      dense += 1
  return model.norm(x), loads


@pytest.mark.parametrize(
  'cfg',
  [CONFIG, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (IRREGULAR, WINDOWED))],
  ids=['dense first', 'dense between', 'windows'],
)
def test_scans_are_a_loop_over_the_layers(cfg: ModelConfig) -> None:
  hidden, loads = loop(model_of(cfg), biases(cfg), cfg.attention.windows)
  np.testing.assert_allclose(hidden, output_of(cfg).hidden, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(loads, output_of(cfg).aux.load)


def test_unrolling_changes_nothing() -> None:
  unrolled = output_of(replace(unroll=2))
  np.testing.assert_allclose(unrolled.hidden, output_of(CONFIG).hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', sorted(set(REMAT_POLICIES) - {'none'}))
def test_remat_changes_nothing(remat: str) -> None:
  cfg = replace(remat=remat)
  (value, gradient), (value2, gradient2) = (differentiate(model_of(c), c) for c in (CONFIG, cfg))
  np.testing.assert_allclose(value2, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_caches_have_room_for_each_layer_in_the_compute_dtype() -> None:
  caches = jax.eval_shape(lambda: empty_caches(B, 5, replace(dtype='bfloat16')))
  assert set(caches) == {'layers'}
  # A run of the dense layer, and one of the two others.
  shapes = [cache.entries[0].shape for cache in caches['layers']]
  assert shapes == [(1, B, 1, 5, 8), (2, B, 1, 5, 8)]
  assert caches['layers'][0].entries[1].dtype == jnp.bfloat16
