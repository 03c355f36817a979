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

from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.experts import ragged_dot_ffn
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import BEST_BY_PLATFORM
from moejax.moe.experts.residuals import FfnGradients, Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.dispatch_oracle import DY as DY_BSD
from tests.support.dispatch_oracle import GPT_OSS, experts, jobs, run, run_on_one_device
from tests.support.dispatch_oracle import T as TOKENS
from tests.support.emulated_exchange import emulate
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
  monkeypatch.setattr(ragged_dot_ffn, 'window_size', lambda num_copies, even_share: size)
  anew = jax.jit(lambda x, ids: both_passes(x, ids), compiler_options=QUICK)
  for name, ids in IDS.items():
    check(anew(X, ids), want[name])


def test_devices_with_more_windows_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
  want = {name: in_one_window(name) for name in IDS}
  monkeypatch.setattr(ragged_dot_ffn, 'window_size', lambda num_copies, even_share: 16)
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
  """A quarter more than its 1000 copies, in tiles; without a share, or with less room, all copies.

  How much room there is does not matter: it is less where a token has more experts than a device.
  """
  window_size = ragged_dot_ffn.window_size
  assert [window_size(n, even_share=1000) for n in (4000, 2000, 100)] == [1280, 1280, 100]
  assert window_size(4000, even_share=0) == 4000


@pytest.mark.parametrize('exchange', ['gather', 'ragged'])
def test_fewer_local_experts_than_a_token_has(
  exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Experts over four devices, one each, of which a token has three.

  A device has room for a copy of each token of the group, and of an even routing gets three
  quarters of those: windows are made for that many, and all that comes is computed.
  """
  emulate(monkeypatch)
  monkeypatch.setitem(BEST_BY_PLATFORM, 'cpu', 'ragged_dot')
  monkeypatch.setattr(ragged_dot_ffn, 'TILE', 2)
  shares = []
  window_size = ragged_dot_ffn.window_size

  def recording(num_copies: int, even_share: int) -> int:
    shares.append((num_copies, even_share))
    return window_size(num_copies, even_share)

  monkeypatch.setattr(ragged_dot_ffn, 'window_size', recording)
  cfg, top_k = DispatchConfig(exchange=exchange), 3
  weights = experts(4, GPT_OSS.bias)

  def both(*args: object) -> object:
    # Not `run`, whose cache may hold a trace of another implementation.
    return run.__wrapped__(cfg, *args, GPT_OSS.activation)

  anew = jax.jit(both, compiler_options=QUICK)
  with jax.set_mesh(make_mesh(MeshConfig(expert=4), jax.devices()[:4])):
    for label in ('plain', 'all to the same'):
      job = jobs(4, top_k)[label]
      got = jax.tree.map(np.asarray, anew(job, weights, DY_BSD))
      check(got, run_on_one_device(cfg, 4, top_k, label, GPT_OSS))
  assert set(shares) == {(TOKENS, TOKENS // 4 * top_k)}
