"""Each implementation of softmax attention against the oracle: values, gradients, and the mask."""

import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import attention_cores
from moejax.model.attention_cores import ATTENTIONS
from tests.support import oracle
from tests.support.quick import QUICK

# cuDNN is not here, and its row is the xla row: see test_cudnn_attention.py. So is splash where
# blocks do not fit: see test_splash_attention.py.
ROWS = sorted(set(ATTENTIONS) - {'cudnn', 'splash'})
B, S, H, J, D = 2, 11, 4, 2, 4
# Row 0: two documents and padding behind; row 1: padding in front, three documents, one of a token.
SEGMENTS = np.array(
  [[1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3]], np.int32
)
REAL = SEGMENTS > 0
RNG = np.random.default_rng(0)
Q, DY = (RNG.normal(size=(B, S, H, D)).astype(np.float32) for _ in range(2))
K, V = (RNG.normal(size=(B, S, J, D)).astype(np.float32) for _ in range(2))
SINKS = np.array([0.5, -1, 2, 0], np.float32)
DY *= REAL[..., None, None]


class Variant(NamedTuple):
  window: int = 0
  scale: float = D**-0.5
  sinks: bool = False
  width: int = D  # of values

  def arrays(self, length: int = S) -> tuple[np.ndarray, ...]:
    """q, k, v and perhaps sinks."""
    v = np.concatenate([V, -V[..., :2]], -1)[:, :length, :, : self.width]
    return (Q[:, :length], K[:, :length], v, *[SINKS] * self.sinks)

  def dy(self, length: int = S) -> np.ndarray:
    return np.concatenate([DY, -DY[..., :2]], -1)[:, :length, :, : self.width]

  def oracle(
    self,
    segments: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sinks: np.ndarray | None = None,
  ) -> np.ndarray:
    return oracle.attention(q, k, v, segments, window=self.window, scale=self.scale, sinks=sinks)


VARIANTS = {
  'plain': Variant(),
  'window': Variant(3),
  'window of one': Variant(1),
  'sinks': Variant(sinks=True),
  'narrow values': Variant(0, 0.3, False, 3),
  'wide values': Variant(0, 0.3, False, 6),
  'everything': Variant(4, 0.3, True, 3),
}
PLAIN = VARIANTS['plain']


def forward(
  name: str,
  variant: Variant,
  segments: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  sinks: jax.Array | None = None,
) -> jax.Array:
  return ATTENTIONS[name](q, k, v, segments, variant.window, variant.scale, sinks)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def run(
  name: str, variant: Variant, arrays: tuple[jax.Array, ...], segments: jax.Array, dy: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """y, and the gradients of y · dy to the arrays."""
  y, back = jax.vjp(functools.partial(forward, name, variant, segments), *arrays)
  return y, back(dy)


# 11 has no even chunks, 3 has fewer tokens than there are chunks, 8 is cut evenly.
@pytest.mark.parametrize(
  ('name', 'variant', 'length'),
  [
    *(('chunked', variant, S) for variant in VARIANTS),
    *(('chunked', 'plain', length) for length in (8, 3, 1)),
    ('chunked', 'everything', 8),
    *(('xla', variant, S) for variant in ('plain', 'window', 'everything', 'wide values')),
  ],
)
def test_values_and_gradients_are_the_oracles(name: str, variant: str, length: int) -> None:
  this, segments = VARIANTS[variant], SEGMENTS[:, :length]
  arrays, dy, real = this.arrays(length), this.dy(length), segments > 0
  y, gradients = run(name, this, arrays, segments, dy)
  np.testing.assert_allclose(y[real], this.oracle(segments, *arrays)[real], rtol=1e-5, atol=1e-6)
  for i, gradient in enumerate(gradients):
    direction = np.random.default_rng(i).normal(size=gradient.shape)

    def f(a: np.ndarray, i: int = i) -> float:
      return float((this.oracle(segments, *arrays[:i], a, *arrays[i + 1 :]) * dy).sum())

    slope = oracle.slope(f, arrays[i], direction)
    np.testing.assert_allclose(
      (gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4, err_msg='qkvs'[i]
    )


@pytest.mark.parametrize('variant', ['plain', 'window', 'everything'])
@pytest.mark.parametrize('name', ROWS)
def test_a_token_sees_its_own_document_up_to_itself_and_nothing_else(
  name: str, variant: str
) -> None:
  """To the bit: a key or value elsewhere changes nothing and has no gradient.

  One that is seen does both.
  """
  this = VARIANTS[variant]
  q, *kv = this.arrays()

  def sees(row: int, query: int, key: int) -> bool:
    near = 0 <= query - key < (this.window or S)
    return near and SEGMENTS[row, query] == SEGMENTS[row, key]

  y, _ = run(name, this, this.arrays(), SEGMENTS, this.dy())
  for key in range(S):
    k, v, *sinks = (a.copy() for a in kv)
    k[:, key] += 3
    v[:, key] -= 5
    other, _ = run(name, this, (q, k, v, *sinks), SEGMENTS, this.dy())
    moved = (np.asarray(other) != np.asarray(y)).any((-1, -2))
    want = [[sees(b, query, key) for query in range(S)] for b in range(B)]
    np.testing.assert_array_equal(moved[REAL], np.array(want)[REAL], err_msg=f'{key=}')
  for query in range(S):
    one = np.zeros_like(this.dy())
    one[:, query] = this.dy()[:, query]
    want = [
      [bool(SEGMENTS[b, query]) and sees(b, query, key) for key in range(S)] for b in range(B)
    ]
    for gradient in run(name, this, this.arrays(), SEGMENTS, one)[1][1:3]:
      reached = np.asarray(gradient).any((-1, -2))
      # The only key that a query sees has all of its weight, whatever it is: no gradient to k.
      assert not (reached & ~np.array(want)).any(), query
    np.testing.assert_array_equal(reached, want, err_msg=f'{query=}')


@pytest.mark.parametrize('variant', ['plain', 'everything'])
@pytest.mark.parametrize('name', ROWS)
def test_padding_is_finite_and_reaches_nobody(name: str, variant: str) -> None:
  this, nothing = VARIANTS[variant], np.zeros_like(SEGMENTS)
  garbage = np.where(REAL[..., None, None], 1, 1e4).astype(np.float32)
  for segments, scale in ((nothing, 1), (SEGMENTS, garbage)):
    q, k, v, *sinks = this.arrays()
    y, gradients = run(name, this, (q * scale, k * scale, v * scale, *sinks), segments, this.dy())
    assert all(np.isfinite(a).all() for a in (y, *gradients))
  want, want_gradients = run(name, this, this.arrays(), SEGMENTS, this.dy())
  np.testing.assert_array_equal(np.asarray(y)[REAL], np.asarray(want)[REAL])
  for gradient, wanted in zip(gradients[:3], want_gradients):
    np.testing.assert_array_equal(np.asarray(gradient)[REAL], np.asarray(wanted)[REAL])
    assert not np.asarray(gradient)[~REAL].any()
  for gradient, wanted in zip(gradients[3:], want_gradients[3:]):
    np.testing.assert_array_equal(gradient, wanted)


@pytest.mark.parametrize('variant', ['plain', 'sinks'])
@pytest.mark.parametrize('name', ROWS)
def test_steep_scores_stay_finite_and_masked(name: str, variant: str) -> None:
  """Scores down to -1e10, below what might stand for minus infinity; and up to 1e10.

  There exp would overflow.
  """
  this = VARIANTS[variant]
  q, k, *rest = this.arrays()
  steep = 1e5 * q, 1e5 * k, *rest
  y, gradients = run(name, this, steep, SEGMENTS, this.dy())
  assert all(np.isfinite(a).all() for a in (y, *gradients))
  np.testing.assert_allclose(y[REAL], this.oracle(SEGMENTS, *steep)[REAL], rtol=1e-5, atol=1e-6)


def test_a_sink_takes_what_is_its_due() -> None:
  """A large sink takes all weight, a small one none, whichever key head the head shares."""
  y, _ = run('chunked', PLAIN, PLAIN.arrays(), SEGMENTS, DY)
  sinks = np.array([-1e9, 1e9, 0, -1e9], np.float32)
  some, _ = run('chunked', VARIANTS['sinks'], (Q, K, V, sinks), SEGMENTS, DY)
  y, some = np.asarray(y)[REAL], np.asarray(some)[REAL]
  np.testing.assert_allclose(some[:, [0, 3]], y[:, [0, 3]], rtol=1e-6)
  assert not some[:, 1].any() and (np.abs(some[:, 2]) < np.abs(y[:, 2])).all()


def test_chunks_multiply_no_key_that_none_of_them_sees(monkeypatch: pytest.MonkeyPatch) -> None:
  done: list[tuple[int, int]] = []

  def spy(q: jax.Array, k: jax.Array, *rest: object, **named: object) -> jax.Array:
    done.append((q.shape[1], k.shape[1]))
    return q

  monkeypatch.setattr(attention_cores, 'attend', spy)
  long = np.ones((1, 64), np.int32)
  q, k = np.zeros((1, 64, H, D)), np.zeros((1, 64, J, D))
  for window, want in (
    (0, [(16, 16), (16, 32), (16, 48), (16, 64)]),
    (32, [(16, 16), (16, 32), (16, 47), (16, 47)]),
    (4, [(4, 4), *[(4, 7)] * 15]),
    (100, [(16, 16), (16, 32), (16, 48), (16, 64)]),
  ):
    done.clear()
    jax.eval_shape(functools.partial(forward, 'chunked', Variant(window), long), q, k, k)
    assert done == want, window


def test_rows_that_are_the_xla_row_here() -> None:
  assert ROWS == ['chunked', 'xla'] and set(attention_cores.BEST_CORES.values()) <= set(ATTENTIONS)
  for variant in (PLAIN, VARIANTS['everything']):
    xla, *others = (
      run(name, variant, variant.arrays(), SEGMENTS, variant.dy())[0]
      for name in ('xla', 'cudnn', 'splash')
    )
    for y in others:
      np.testing.assert_array_equal(y, xla)


def test_bfloat16_rounds_no_softmax() -> None:
  for name, variant in itertools.product(ROWS, (PLAIN, VARIANTS['sinks'])):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (Q, K, V))
    arrays = q, k, v, *variant.arrays()[3:]
    y, _ = run(name, variant, arrays, SEGMENTS, q)
    assert y.dtype == jnp.bfloat16
    full, _ = run(name, variant, variant.arrays(), SEGMENTS, DY)
    np.testing.assert_allclose(y[REAL].astype(jnp.float32), full[REAL], atol=0.05)
    program = str(jax.make_jaxpr(functools.partial(forward, name, variant, SEGMENTS))(*arrays))
    assert {*re.findall(r':(\w+)\[[\d,]*\] = (?:exp|reduce_sum)\b', program)} == {'f32'}, program
