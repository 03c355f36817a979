"""Numbers that change over a run, written as text: coefficients, the bias rate, the learning rate.

'0.1, 0.01@10%, 0.001@70%'    0.1, from a tenth of the run on 0.01, from 70% on 0.001
'1, cosine 0.1@60%, 0.03@90%' 1; from 60% on by half a cosine to 0.1, which it reaches at 90%; from
                              there on 0.03
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.config.checks import LARGEST
from moejax.config.decimals import decimal_of

Schedule = Callable[[Array], Array]

# How a piece goes from the value before it to its own, by the part of the piece that has passed.
SHAPES: dict[str, Callable[[Array], Array]] = {
  '': jnp.ones_like,  # at once
  'cosine': lambda passed: (1 - jnp.cos(jnp.pi * passed)) / 2,
  'linear': lambda passed: passed,
}


class Piece(NamedTuple):
  """A part of a schedule, up to where the next one starts, or to the end of the run."""

  start: Fraction  # of the run, 0 to 1, exactly as it is written
  value: float  # with a shape, the value at the end of the piece; without one, of all of it
  shape: str = ''  # how the value is reached: a row of SHAPES


def pieces(spec: str | float) -> list[Piece]:
  """Returns the pieces of a schedule: '1, cosine 0.1@60%' -> [(0, 1, ''), (0.6, 0.1, 'cosine')].

  Raises:
    ValueError: it is not of that form, the starts are not in order, or a number is out of range.
  """
  first, *others = str(spec).split(',')
  # The first piece is a bare number: it has no value before it that it could leave from.
  parsed = [Piece(Fraction(0), float(first))]
  for text in others:
    words, _, start = text.strip().partition('@')
    *shape_words, value = words.split()  # ValueError where there is no word
    shape = ' '.join(shape_words)
    if not start.endswith('%') or shape not in SHAPES:
      raise ValueError(spec)
    parsed.append(Piece(decimal_of(float(start[:-1])) / 100, float(value), shape))
  starts = [piece.start for piece in parsed]
  # A value that is NaN, or inf in float32, is out of range as well.
  in_range = all(0 <= piece.start <= 1 and 0 <= piece.value <= LARGEST for piece in parsed)
  if not in_range or starts != sorted(starts):
    raise ValueError(spec)
  return parsed


def schedule_problem(field: str, spec: str | float) -> str:
  """Returns what is wrong with the schedule in a config's field, '' if nothing is."""
  try:
    pieces(spec)
  except ValueError:
    return (
      f'{field}={spec!r} is not a schedule: use a number of 0 or more, or values with the part of '
      "the run from which each holds, such as '0.1, 0.01@10%, 0.001@70%', or with a slope that "
      "ends where the next one begins, such as '1, cosine 0.1@60%, 0.1@90%'"
    )
  return ''


def piecewise(spec: str | float, steps: int) -> Schedule:
  """Returns the function from a step of the run to the schedule's value, f32, both scalars.

  It can be traced: the step may be an array inside jit. A piece without a shape has its value from
  its first step on.

  Args:
    spec: the schedule.
    steps: length of the run, of which the schedule's percentages are parts.
  """
  parsed = pieces(spec)
  values = jnp.array([piece.value for piece in parsed], jnp.float32)
  first_steps = [round(piece.start * steps) for piece in parsed]
  edges = jnp.array([*first_steps, steps], jnp.int32)  # piece i is from edges[i] to edges[i + 1]

  def value_at(step: Array) -> Array:
    index = (step >= edges[1:-1]).sum()
    length = jnp.maximum(edges[index + 1] - edges[index], 1)  # a piece of no step: no 0 / 0
    passed = jnp.clip((step - edges[index]) / length, 0, 1)
    part = jnp.stack([SHAPES[piece.shape](passed) for piece in parsed])[index]
    # Not before + part * (value - before): that is not exactly the value where part is 1.
    return (1 - part) * values[jnp.maximum(index - 1, 0)] + part * values[index]

  return value_at
