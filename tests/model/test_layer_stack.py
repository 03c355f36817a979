"""Layers that a scan runs: the same as a loop, with windows that alternate, and under remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.blocks import Route
from moejax.model.config import (
  REMAT_POLICIES,
  ModelConfig,
)
from moejax.model.layer_stack import turn_windows
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
  forward,
  model_of,
  output_of,
  replace,
)
from tests.support.quick import QUICK


def test_scan_is_a_loop_over_the_layers() -> None:
  model, cfg = model_of(CONFIG), CONFIG

  @functools.partial(jax.jit, compiler_options=QUICK)
  def loop(model: Transformer) -> tuple[jax.Array, list[jax.Array]]:
    x, loads = model.embed(TOKENS, jnp.float32), []
    for i in range(cfg.num_dense_layers):
      x, _ = jax.tree.map(lambda a, i=i: a[i], model.dense_blocks)(x, BATCH, 0, None)
    for i in range(cfg.num_moe_layers):
      block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
      tokens = Tokens(TOKENS, REAL, SEGMENTS, jnp.arange(B))
      x, _, aux = block(x, BATCH, 0, None, Route(biases(cfg)[i], tokens, None))
      loads.append(aux.load)
    return model.norm(x), loads

  hidden, loads = loop(model)
  np.testing.assert_allclose(hidden, output_of(cfg).hidden, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(loads, output_of(cfg).aux.load)
  np.testing.assert_allclose(output_of(replace(unroll=2)).hidden, hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_windows_alternate_by_layer_whatever_a_turn_of_the_scan_holds() -> None:
  """The period divides the stack (a turn of two layers), or does not (one turn of all).

  It starts in the dense stack.
  """

  def windowed(windows: tuple[int, ...], layers: int) -> ModelConfig:
    attention = dataclasses.replace(CONFIG.attention, windows=windows)
    return replace(num_layers=layers, attention=attention)

  for layers, want in ((5, (2, 1)), (4, (2, 1, 2))):
    assert turn_windows('dense_blocks', windowed((1, 2), layers)) == (1,)
    assert turn_windows('blocks', windowed((1, 2), layers)) == want
  model, hidden = model_of(CONFIG), {}
  for windows in ((2, 0), (2, 0, 2), (0, 2), (0,)):
    cfg = windowed(windows, 3)
    this = jax.tree.unflatten(jax.tree.structure(model_of(cfg)), jax.tree.leaves(model))
    hidden[windows] = np.asarray(forward(this, BATCH, biases(cfg)).hidden)
  # Two turns' worth, and one turn.
  np.testing.assert_allclose(hidden[2, 0], hidden[2, 0, 2], rtol=1e-5, atol=1e-5)
  for windows in ((0, 2), (0,)):
    assert np.abs(hidden[windows] - hidden[2, 0])[REAL].max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('remat', sorted(set(REMAT_POLICIES) - {'none'}))
def test_remat_changes_nothing(remat: str) -> None:
  cfg = replace(remat=remat)
  (value, gradient), (value2, gradient2) = (differentiate(model_of(c), c) for c in (CONFIG, cfg))
  np.testing.assert_allclose(value2, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_remat_recomputes() -> None:
  """The more products in the program, the fewer kept for its backward pass."""
  products = {}
  for remat in REMAT_POLICIES:
    cfg = replace(remat=remat)
    products[remat] = str(differentiate.trace(model_of(cfg), cfg).jaxpr).count('dot_general')
  assert products['none'] < products['dots'] < products['full'], products


def test_caches_have_room_for_each_layer_in_the_compute_dtype() -> None:
  caches = jax.eval_shape(lambda: empty_caches(B, 5, replace(dtype='bfloat16')))
  assert {name: [cache.entries[0].shape for cache in turn] for name, turn in caches.items()} == {
    'dense_blocks': [(1, B, 1, 5, 8)],
    'blocks': [(2, B, 1, 5, 8)],
  }
  assert caches['blocks'][0].entries[1].dtype == jnp.bfloat16
  assert set(jax.eval_shape(lambda: empty_caches(B, 5, replace(num_dense_layers=0)))) == {'blocks'}
