"""The plain layers against the oracle: values, gradients of every input, how parameters start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.model.layers import Embed, Linear, RMSNorm, rms_norm
from moejax.moe.experts.ffn import SwiGLU
from moejax.sharding.params import normal_init, param
from tests.support import oracle
from tests.support.quick import QUICK

D, F, V = 6, 10, 7
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, D)).astype(np.float32)
DY = RNG.normal(size=(2, 3, D)).astype(np.float32)
KEY = jax.random.key(0)


def weights(layer: nnx.Module) -> dict[str, np.ndarray]:
  return {
    name: np.asarray(value[...], np.float64)
    for name, value in vars(layer).items()
    if isinstance(value, nnx.Param)
  }


def oracle_swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
  tokens = np.asarray(x, np.float64).reshape(-1, D)
  return np.stack([oracle.swiglu(t, gate, up, down) for t in tokens]).reshape(x.shape)


def scaled_norm(eps: float) -> RMSNorm:
  layer = RMSNorm(KEY, D, eps)
  layer.scale[...] = jnp.arange(1.0, D + 1)
  return layer


# layer -> (the layer, what the oracle says of x and its weights)
LAYERS = {
  'linear': (Linear(KEY, (D, D), ('embed', 'mlp'), 0.5), lambda x, w: x @ w),
  # An eps as large as the mean square: one in the wrong place shows.
  'rms_norm': (scaled_norm(0.5), lambda x, scale: oracle.rms_norm(x, scale, 0.5)),
  'swiglu': (SwiGLU(KEY, D, F, 0.5), oracle_swiglu),
}


@pytest.mark.parametrize('name', LAYERS)
def test_values_and_gradients_are_the_oracles(name: str) -> None:
  layer, oracle_layer = LAYERS[name]
  run = jax.jit(lambda layer, x: layer(x), compiler_options=QUICK)
  w = weights(layer)
  np.testing.assert_allclose(
    run(layer, X), oracle_layer(X.astype(np.float64), **w), rtol=1e-5, atol=1e-6
  )

  differentiate = jax.jit(
    jax.grad(lambda layer, x: (layer(x) * DY).sum(), (0, 1)), compiler_options=QUICK
  )
  to_layer, to_x = differentiate(layer, X)
  for key, gradient in (weights(to_layer) | {'x': to_x}).items():

    def f(a: np.ndarray, key: str = key) -> float:
      inputs = {'x': X.astype(np.float64)} | w | {key: a}
      return float((oracle_layer(**inputs) * DY).sum())

    want = oracle.finite_difference(f, {'x': X, **w}[key])
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5, err_msg=key)


def test_rms_norm_thinks_in_float32() -> None:
  """In bfloat16 a mean of squares would be off by 2^-9; only input and output are rounded to it."""
  x = RNG.normal(size=(4, 256)).astype(jnp.bfloat16)
  y = rms_norm(jnp.asarray(x), jnp.ones(256), 1e-6)
  assert y.dtype == jnp.bfloat16
  want = oracle.rms_norm(x.astype(np.float64), np.ones(256), 1e-6)
  assert np.abs(np.asarray(y, np.float64) / want - 1).max() <= 2.0**-8


def test_rms_norm_of_huge_and_of_no_numbers() -> None:
  for x in (np.full((1, D), 1e15), np.zeros((1, D))):
    y, back = jax.vjp(jax.jit(lambda a: rms_norm(a, jnp.ones(D), 1e-6)), jnp.float32(x))
    assert np.isfinite(y).all() and np.isfinite(back(y)[0]).all()
    np.testing.assert_allclose(y, x > 0, rtol=1e-6)


def test_a_new_norm_scales_by_one() -> None:
  np.testing.assert_array_equal(RMSNorm(KEY, D, 1e-6).scale[...], np.ones(D))


TOKENS = np.array([[3, 0, 6], [3, 3, 1]])


def test_embed_looks_up_rows_and_adds_up_their_gradients() -> None:
  embed = Embed(KEY, V, D, 0.5)
  table = np.asarray(embed.table[...])
  look_up = jax.jit(lambda embed, dtype: embed(TOKENS, dtype), static_argnums=1)
  for dtype in (jnp.float32, jnp.bfloat16):
    np.testing.assert_array_equal(look_up(embed, dtype), table[TOKENS].astype(dtype))
  differentiate = jax.jit(jax.grad(lambda embed: (embed(TOKENS, jnp.float32) * DY).sum()))
  gradient = differentiate(embed).table[...]
  want = np.zeros((V, D))
  for t in np.ndindex(TOKENS.shape):
    want[TOKENS[t]] += DY[t]
  np.testing.assert_allclose(gradient, want, rtol=1e-6)


def test_embed_is_a_gather() -> None:
  """As a one-hot matmul it would be V times the work."""
  text = str(jax.make_jaxpr(lambda embed: embed(TOKENS, jnp.float32))(Embed(KEY, V, D, 0.5)))
  assert 'gather' in text and 'dot_general' not in text


AXES = {
  'linear': {'w': ('embed', 'mlp')},
  'rms_norm': {'scale': ('norm',)},
  'swiglu': {'gate': ('embed', 'mlp'), 'up': ('embed', 'mlp'), 'down': ('mlp', 'embed')},
}


@pytest.mark.parametrize('name', AXES)
def test_parameters_are_float32_and_know_their_axes(name: str) -> None:
  layer = LAYERS[name][0]
  found = {key: value for key, value in vars(layer).items() if isinstance(value, nnx.Param)}
  assert {key: value.get_metadata('axes') for key, value in found.items()} == AXES[name]
  assert all(value[...].dtype == jnp.float32 for value in found.values())
  y = layer(jnp.asarray(X, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16, 'computes in the dtype it is given'


def test_param_wants_an_axis_for_each_dimension() -> None:
  assert param(KEY, (V, D), ('vocab', ''), normal_init(1.0)).get_metadata('axes') == ('vocab', '')
  with pytest.raises(AssertionError):
    param(KEY, (V, D), ('vocab',), normal_init(1.0))


def test_parameters_start_with_the_spread_asked_for_and_differ_from_each_other() -> None:
  layer = jax.jit(lambda key: SwiGLU(key, 32, 64, 0.02))(KEY)
  for w in weights(layer).values():
    assert abs(w.std() / 0.02 - 1) < 0.1 and abs(w.mean()) < 0.002
  assert not np.allclose(layer.gate[...], layer.up[...])
