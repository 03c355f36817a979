"""The kernel for TPUs, interpreted: values and gradients are the chunked attention's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.attention_cores import ATTENTIONS
from moejax.model.splash_attention import supports
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.quick import QUICK

B, S, H, J, D, V = 4, 256, 4, 2, 6, 4
RNG = np.random.default_rng(0)
Q, K, VALUES, DY = (
  RNG.normal(size=(B, S, heads, width)).astype(np.float32)
  for heads, width in ((H, D), (J, D), (J, V), (H, V))
)
SINKS = np.array([0.5, -1, 2, 0], np.float32)
# Documents, with padding in front of the first row and behind the others.
SEGMENTS = np.sort(RNG.integers(0, 4, (B, S)), 1).astype(np.int32)
SEGMENTS[1:] = 3 - SEGMENTS[1:]


def both(
  name: str, window: int, sinks: np.ndarray | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """y, and the gradients to q, k, v and sinks."""
  segments = jnp.asarray(SEGMENTS)
  arrays = (Q, K, VALUES) if sinks is None else (Q, K, VALUES, sinks)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    return ATTENTIONS[name](q, k, v, segments, window, D**-0.5, sinks)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(arrays: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, back = jax.vjp(attend, *arrays)
    return y, back(dy)

  return run(arrays, DY)


@pytest.mark.parametrize(
  ('sizes', 'window', 'sinks'),
  [(MeshConfig(), 0, None), (MeshConfig(fsdp=2, expert=2, tensor=2), 37, SINKS)],
  ids=['one device', 'mesh'],
)
def test_values_and_gradients(
  sizes: MeshConfig, window: int, sinks: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr('moejax.model.splash_attention.BLOCKS', (128,))  # two by two
  want = both('chunked', window, sinks)
  with jax.set_mesh(make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.expert * sizes.tensor])):
    got = both('splash', window, sinks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_what_does_not_divide_is_not_for_the_kernel() -> None:
  def fits(rows: int, length: int, kv_heads: int) -> bool:
    return supports(jnp.zeros((rows, length, 4, 8)), jnp.zeros((rows, length, kv_heads, 8)))

  assert [fits(1, 128, 1), fits(1, 130, 1)] == [True, False]
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
    assert [fits(2, 128, 2), fits(1, 128, 2), fits(2, 128, 1)] == [True, False, False]
