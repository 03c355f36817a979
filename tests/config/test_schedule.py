"""Numbers that change over a run: what a text says, and what is none; pieces and slopes."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schedule import pieces, piecewise, schedule_problem


@pytest.mark.parametrize(
  ('spec', 'want'),
  [
    (0.01, [(0, 0.01)]),
    (0, [(0, 0)]),
    ('1e-3', [(0, 1e-3)]),
    ('0.1, 0.01@10%, 0.001@70%', [(0, 0.1), (0.1, 0.01), (0.7, 0.001)]),
    ('0,1@33.5%', [(0, 0), (0.335, 1)]),
    ('1, 0@100%', [(0, 1), (1, 0)]),
    ('1, cosine 0.1@60%, linear  0@90%', [(0, 1), (0.6, 0.1, 'cosine'), (0.9, 0, 'linear')]),
  ],
  ids=str,
)
def test_pieces_of_a_schedule(spec: str | float, want: list[tuple]) -> None:
  assert [(float(piece.start), piece.value) for piece in pieces(spec)] == [p[:2] for p in want]
  assert [(piece.shape,) for piece in pieces(spec)] == [piece[2:] or ('',) for piece in want]
  assert schedule_problem('rate', spec) == ''


@pytest.mark.parametrize('steps', [50, 100, 500, 1000, 1500, 12_345])
def test_a_piece_starts_at_the_nearest_step_of_the_percentage_as_written(steps: int) -> None:
  """In tenths of a percent; a half goes to the even step. 0.7 / 100 * 500 is 3.4999999999999996."""
  for tenths in range(0, 1001, 7):
    first, last = pieces(f'0, 1@{tenths / 10}%, 2@100%')[1:]
    assert round(first.start * steps) == round(Fraction(tenths, 1000) * steps), tenths
    assert last.start == 1
  value = piecewise('0, 1@0.7%', 500)
  assert [float(value(jnp.int32(step))) for step in (3, 4)] == [0, 1]


@pytest.mark.parametrize(
  'spec',
  [
    '',
    'x',
    '0.1,',
    '0.1, 0.2',
    '0.1@10%',
    '0.1, 0.2@10',
    '0.1, 0.2@x%',
    '0.1, 0.2@%',
    '0.1, 0.2@70%, 0.3@10%',
    '0.1, 0.2@nan%',
    'cosine 1',
    '1, sine 0@10%',
    '1, cosine@10%',
    '1, cosine 0.1',
    '1, cosine linear 0@10%',
    '1, 2 3@10%',
    '0.1, 0.2@101%',
    '0.1, 0.2@-1%',
    -0.1,
    '-0.1',
    '0.1, -0.2@10%',
    'nan',
    'inf',
    math.inf,
    math.nan,
  ],
  ids=repr,
)
def test_what_is_no_schedule_is_told(spec: str | float) -> None:
  with pytest.raises(ValueError):
    pieces(spec)
  problem = schedule_problem('bias_rate', spec)
  assert problem.startswith(f'bias_rate={spec!r} is not a schedule: use '), problem


def test_piecewise_changes_at_the_fractions_of_the_run() -> None:
  value = jax.jit(jax.vmap(piecewise('3, 2@10%, 1@70%, 0@100%', 20)))
  found = value(jnp.arange(21))
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, [3] * 2 + [2] * 12 + [1] * 6 + [0])
  np.testing.assert_array_equal(jax.vmap(piecewise(0.5, 20))(jnp.arange(3)), [0.5] * 3)


def test_slopes_leave_from_the_value_before_and_arrive_where_the_next_begins() -> None:
  value = jax.jit(jax.vmap(piecewise('1, linear 2@20%, cosine 0@40%, 5@60%, linear 0@80%', 20)))
  found = value(jnp.arange(21))
  np.testing.assert_allclose(found[:8], [1, 1, 1, 1, 1, 1.25, 1.5, 1.75], rtol=1e-6)
  np.testing.assert_allclose(
    found[8:12], [1 + math.cos(math.pi * i / 4) for i in range(4)], rtol=1e-6
  )
  np.testing.assert_allclose(found[12:], [5, 5, 5, 5, 5, 3.75, 2.5, 1.25, 0], rtol=1e-6)


def test_a_slope_from_the_first_step_and_one_of_no_length() -> None:
  found = jax.vmap(piecewise('1, linear 0@0%', 4))(jnp.arange(6))
  np.testing.assert_allclose(found, [1, 0.75, 0.5, 0.25, 0, 0])
  np.testing.assert_allclose(
    jax.vmap(piecewise('1, linear 0@50%, 3@50%', 4))(jnp.arange(5)), [1, 1, 3, 3, 3]
  )
