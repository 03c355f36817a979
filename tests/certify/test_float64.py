"""A traced program in float64: loops, calls, custom derivatives, random bits and scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.certify.float64 import in_float64

X = np.linspace(0.1, 1, 7).astype(np.float32)


@jax.custom_vjp
def halved(x: jax.Array) -> jax.Array:
  return x / 3


halved.defvjp(lambda x: (x / 3, None), lambda kept, g: (g,))

PROGRAMS = {
  'scan': lambda x: jax.lax.scan(lambda c, a: (c + jnp.sin(a), c * a), 0.0, x)[0],
  'while': lambda x: jax.lax.fori_loop(0, 5, lambda i, c: jnp.cos(c) + x[i], 0.0),
  'cond': lambda x: jax.lax.cond(x.sum() > 1, jnp.exp, jnp.sin, x).sum(),
  'custom derivative': lambda x: halved(x).sum(),
  'remat': lambda x: jax.checkpoint(lambda a: jnp.exp(jnp.sin(a)).sum())(x),
  'gradient of remat': lambda x: jax.grad(jax.checkpoint(lambda a: jnp.exp(jnp.sin(a)).sum()))(x),
  'scatter': lambda x: jnp.zeros(3, jnp.float32).at[jnp.array([0, 2, 0])].add(x[:3] / 3),
  'forced to float32': lambda x: jnp.einsum(
    'i,i->', x.astype(jnp.float32), x, preferred_element_type=jnp.float32
  ),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_has_the_errors_of_float64(name: str) -> None:
  program = PROGRAMS[name]
  narrow = np.asarray(program(jnp.asarray(X)))
  with jax.enable_x64(True):
    wide = np.asarray(in_float64(program, X)(X))
  assert wide.dtype == np.float64 and narrow.dtype == np.float32
  np.testing.assert_allclose(wide, narrow, rtol=1e-6)
  if name in ('scatter', 'forced to float32'):
    assert np.abs(wide - narrow).max() > 0
    return
  # Written without a dtype, the function itself computes in that of its input.
  with jax.enable_x64(True):
    exact = np.asarray(program(jnp.asarray(X.astype(np.float64))))
  np.testing.assert_allclose(wide, exact, rtol=1e-14)


def test_random_numbers_are_those_of_float32() -> None:
  def noise(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (4,), jnp.float32)

  key = jax.random.key(3)
  with jax.enable_x64(True):
    wide = in_float64(noise, key)(key)
    assert wide.dtype == jnp.float64
  np.testing.assert_array_equal(np.asarray(wide), np.asarray(noise(key)))


def test_what_is_not_needed_is_not_computed() -> None:
  def function(x: jax.Array) -> jax.Array:
    jax.lax.linalg.cholesky(jnp.outer(x, x))
    return x + 1

  with jax.enable_x64(True):
    text = str(jax.make_jaxpr(in_float64(function, X))(X))
  assert 'cholesky' not in text
