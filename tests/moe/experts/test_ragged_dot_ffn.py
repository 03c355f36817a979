"""The grouped FFN in windows of rows, as on a TPU that shares experts with others: the same as in one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.moe.experts import ragged_dot_ffn as ragged
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.quick import QUICK

T, K, E, D, F = 30, 2, 4, 6, 5  # 60 copies
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(T, D)).astype(np.float32) for _ in range(2))
COPY_WEIGHTS = RNG.normal(size=(T, K)).astype(np.float32)
WEIGHTS = Weights(
  *(RNG.normal(size=(E, *s)).astype(np.float32) for s in ((D, F), (D, F), (F, D))),
  Biases(*(RNG.normal(size=(E, n)).astype(np.float32) for n in (F, F, D))),
)
IDS = {
  'uneven': np.minimum(RNG.integers(0, 9, (T, K)), E),  # half of them are nobody's
  'all to two': np.broadcast_to([3, 1], (T, K)),
  'nobody': np.full((T, K), E),
}


def everything(x: jax.Array, ids: jax.Array) -> tuple:
  """y, and the gradients of x, of the copies' weights and of all that experts have."""
  weights, dy = jax.tree.map(jnp.asarray, (WEIGHTS, DY))
  copies, activation = (
    sort_copies(ids, jnp.asarray(COPY_WEIGHTS), E),
    ACTIVATIONS['clamped_swiglu'](7.0),
  )
  y, gate, up = ragged.ragged_forward(x, copies, weights, activation)
  return y, ragged.ragged_backward(x, copies, weights, activation, gate, up, dy)


@functools.cache
def in_one_window(name: str) -> tuple:
  return jax.jit(everything, compiler_options=QUICK)(X, IDS[name])


def check(got: tuple, want: tuple) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize('size', [60, 16, 15])
def test_windows_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
  want = {name: in_one_window(name) for name in IDS}
  monkeypatch.setattr(ragged, 'window_size', lambda copies: size)
  anew = jax.jit(lambda x, ids: everything(x, ids), compiler_options=QUICK)
  for name, ids in IDS.items():
    check(anew(X, ids), want[name])


def test_devices_with_more_windows_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
  want = {name: in_one_window(name) for name in IDS}
  monkeypatch.setattr(ragged, 'window_size', lambda copies: 16)
  mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])

  def own(x: jax.Array, ids: jax.Array) -> tuple:
    return jax.tree.map(lambda a: a[None], everything(x[0], ids[0]))

  names = [*IDS, 'uneven']
  with jax.set_mesh(mesh):
    spread = jax.shard_map(own, in_specs=PartitionSpec('expert'), out_specs=PartitionSpec('expert'))
    got = jax.jit(spread, compiler_options=QUICK)(
      np.stack([X] * 4), np.stack([IDS[name] for name in names])
    )
  for i, name in enumerate(names):
    check(jax.tree.map(lambda a, i=i: a[i], got), want[name])


def test_an_even_routing_takes_one_window() -> None:
  """Of a group of four, whose copies are 4 * 1000: a quarter more than 1000, in tiles. Without a group, everything."""
  with jax.set_mesh(make_mesh(MeshConfig(expert=4), jax.devices()[:4])):
    assert [ragged.window_size(n) for n in (4000, 100)] == [1280, 100]
  assert ragged.window_size(4000) == 4000
