"""Attention in bfloat16 against float64: what is rounded, and what must not be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.attention_cores import ATTENTIONS, attend, visible
from tests.support import oracle
from tests.support.quick import QUICK

# cuDNN and splash are the xla row here.
ROWS = sorted(set(ATTENTIONS) - {'cudnn', 'splash'})
RNG = np.random.default_rng(0)


def rms_error(y: jax.Array, want: np.ndarray) -> float:
  return float(np.sqrt(np.square(np.asarray(y, np.float64) - want).mean()))


# Scores of a standard deviation near 4, the largest near 16.
STEEP = [RNG.normal(0, 2, (1, 48, 2, 64)), RNG.normal(0, 2, (1, 48, 1, 64))]
STEEP_SEGMENTS = np.ones((1, 48), np.int32)


@pytest.mark.parametrize('variant', [(0, False), (17, False), (0, True)])
@pytest.mark.parametrize('name', ROWS)
def test_scores_are_not_rounded_to_bfloat16(name: str, variant: tuple[int, bool]) -> None:
  """What is left is the rounding of weights and result: 1.5e-3 here, and 4e-3 with such scores."""
  q, k = (jnp.asarray(a, jnp.bfloat16) for a in STEEP)
  v = jnp.asarray(RNG.normal(size=k.shape), jnp.bfloat16)
  window, has_sinks = variant
  sinks = np.array([3, -1], np.float32) if has_sinks else None
  core = functools.partial(ATTENTIONS[name], window=window, scale=0.125, sinks=sinks)
  y = jax.jit(core, compiler_options=QUICK)(q, k, v, STEEP_SEGMENTS)
  exact = [np.asarray(a, np.float64) for a in (q, k, v)]
  want = oracle.attention(*exact, STEEP_SEGMENTS, window=window, scale=0.125, sinks=sinks)
  assert y.dtype == jnp.bfloat16 and rms_error(y, want) < 2.2e-3


def test_the_last_query_from_a_cache_is_as_exact() -> None:
  """As decoding calls it: one query, and keys of which it does not see all."""
  q, k = (jnp.asarray(a, jnp.bfloat16) for a in STEEP)
  want = oracle.attention(
    *(np.asarray(a, np.float64) for a in (q, k, k)), STEEP_SEGMENTS, scale=0.125
  )

  @functools.partial(jax.jit, compiler_options=QUICK)
  def last_of(q: jax.Array, last: int) -> jax.Array:
    slots = jnp.array([last]), jnp.arange(48)
    mask = visible(STEEP_SEGMENTS[:, :1], STEEP_SEGMENTS, *slots, 0)
    return attend(q, k, k, mask, 0.125, None)

  errors = []
  for last in range(8, 40):
    errors.append(rms_error(last_of(q[:, last : last + 1], last), want[:, last : last + 1]))
  assert np.mean(errors) < 4.5e-3


@pytest.mark.parametrize('window', [0, 4])
def test_products_are_float32_forward_and_backward(window: int) -> None:
  q, k = (jnp.asarray(a, jnp.bfloat16) for a in STEEP)

  def f(*qkv: jax.Array) -> jax.Array:
    y = ATTENTIONS['chunked'](*qkv, STEEP_SEGMENTS, window, 0.125, np.ones(2, np.float32))
    return y.astype(jnp.float32).sum()

  for program in (f, jax.grad(f, argnums=(0, 1, 2))):
    text = str(jax.make_jaxpr(program)(q, k, k))
    assert {*re.findall(r':(\w+)\[[\d,]*\] = dot_general\b', text)} == {'f32'}, text
