"""The grouped FFN in windows of rows, as on a TPU that shares experts with others.

It is the same as in one window.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.moe.experts import ragged_dot_ffn
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.residuals import FfnGradients, Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.quick import QUICK

T, K, E, D, F = 30, 2, 4, 6, 5  # 60 copies
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(T, D)).astype(np.float32) for _ in range(2))
COPY_WEIGHTS = RNG.normal(size=(T, K)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
  return RNG.normal(size=shape).astype(np.float32)


WEIGHTS = Weights(
  gate=normal(E, D, F),
  up=normal(E, D, F),
  down=normal(E, F, D),
  biases=Biases(gate=normal(E, F), up=normal(E, F), down=normal(E, D)),
)
IDS = {
  'uneven': np.minimum(RNG.integers(0, 9, (T, K)), E),  # half of them are unassigned
  'all to two': np.broadcast_to([3, 1], (T, K)),
  'none assigned': np.full((T, K), E),
}


def both_passes(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, FfnGradients]:
  """y, and the gradients of x, of the copies' weights and of all that experts have."""
  weights, dy = jax.tree.map(jnp.asarray, (WEIGHTS, DY))
  copies = sort_copies(ids, jnp.asarray(COPY_WEIGHTS), E)
  activation = ACTIVATIONS['clamped_swiglu'](7.0)
  y, pre_activations = ragged_dot_ffn.ragged_forward(x, copies, weights, activation)
  residuals = Residuals(x, copies, weights, pre_activations)
  return y, ragged_dot_ffn.ragged_backward(residuals, activation, dy)


@functools.cache
def in_one_window(name: str) -> tuple[jax.Array, FfnGradients]:
  return jax.jit(both_passes, compiler_options=QUICK)(X, IDS[name])


def check(got: tuple, want: tuple) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize('size', [60, 16, 15])
def test_windows_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
  want = {name: in_one_window(name) for name in IDS}
  monkeypatch.setattr(ragged_dot_ffn, 'window_size', lambda num_copies: size)
  anew = jax.jit(lambda x, ids: both_passes(x, ids), compiler_options=QUICK)
  for name, ids in IDS.items():
    check(anew(X, ids), want[name])


def test_devices_with_more_windows_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
  want = {name: in_one_window(name) for name in IDS}
  monkeypatch.setattr(ragged_dot_ffn, 'window_size', lambda num_copies: 16)
  mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])

  def own(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, FfnGradients]:
    return jax.tree.map(lambda a: a[None], both_passes(x[0], ids[0]))

  names = [*IDS, 'uneven']
  with jax.set_mesh(mesh):
    spread = jax.shard_map(own, in_specs=PartitionSpec('expert'), out_specs=PartitionSpec('expert'))
    ids = np.stack([IDS[name] for name in names])
    got = jax.jit(spread, compiler_options=QUICK)(np.stack([X] * 4), ids)
  for i, name in enumerate(names):
    check(jax.tree.map(lambda a, i=i: a[i], got), want[name])


def test_an_even_routing_takes_one_window() -> None:
  """Of a group of four with 4 * 1000 copies: a quarter more than 1000, in tiles.

  Without a group, all copies.
  """
  with jax.set_mesh(make_mesh(MeshConfig(expert=4), jax.devices()[:4])):
    assert [ragged_dot_ffn.window_size(n) for n in (4000, 100)] == [1280, 100]
  assert ragged_dot_ffn.window_size(4000) == 4000
