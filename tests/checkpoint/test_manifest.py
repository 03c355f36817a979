"""Digests see every bit and every swap, and are the same on every mesh."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import manifest

DTYPES = 'float64 int64 float32 uint32 bfloat16 float16 float8_e4m3fn int8 int4 bool'.split()


@pytest.mark.parametrize('dtype', DTYPES)
def test_digest_sees_every_bit_and_every_swap(dtype: str) -> None:
  with jax.enable_x64(True):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5), np.uint8)
    x = np.asarray(bits, jnp.dtype(dtype))
    base = manifest.digests({'x': jnp.asarray(x)})['x']
    assert base == manifest.digests({'x': jnp.asarray(x.copy())})['x']
    for i in range(x.size):
      for bit in range(1 if dtype in ('bool', 'int4') else 8 * x.itemsize):
        y = x.copy()
        y.reshape(-1).view(np.uint8)[i * x.itemsize + bit // 8] ^= 1 << bit % 8
        assert manifest.digests({'x': jnp.asarray(y)})['x'] != base
    y = x.reshape(-1).copy()
    a, b = int(np.flatnonzero(y == y[0])[0]), int(np.flatnonzero(y != y[0])[0])
    y[[a, b]] = y[[b, a]]
    assert manifest.digests({'x': jnp.asarray(y.reshape(x.shape))})['x'] != base


def test_digest_is_the_sums_it_says_it_is_and_the_same_on_every_mesh() -> None:
  x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
  words = x.view(np.uint32).reshape(-1).astype(object)
  want = f'{sum(words) % 2**32:08x}{sum(w * (i + 1) for i, w in enumerate(words)) % 2**32:08x}'
  for shape in [(8, 1), (4, 2), (2, 4)]:
    mesh = jax.make_mesh(shape, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in [
      (),
      ('a',),
      (None, 'b', 'a') if shape == (4, 2) else (('b', 'a'),),
      ('b', None, None),
    ]:
      placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
      assert manifest.digests({'x': placed}) == {'x': want}


def test_one_digest_for_a_run_sees_names_kinds_and_bits() -> None:
  x = jnp.zeros((2, 3))
  trees = [{'a': x}, {'b': x}, {'a': x.T}, {'a': x.astype(jnp.int32)}, {'a': x.at[0, 0].set(-0.0)}]
  assert len({manifest.digest(t) for t in trees}) == len(trees)


def test_meta_is_plain_json(root: Path) -> None:
  assert json.loads((root / '3' / 'meta' / 'metadata').read_text())['meta']['metric'] is None
