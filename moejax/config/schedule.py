"""Numbers that change over a run, written as text: coefficients, the bias rate, the learning rate.

'0.1, 0.01@10%, 0.001@70%'    0.1, from a tenth of the run on 0.01, from 70% on 0.001
'1, cosine 0.1@60%, 0.03@90%' 1; from 60% on by half a cosine to 0.1, which it reaches at 90%; from there on 0.03
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

Schedule = Callable[[Array], Array]

# How a piece goes from the value before it to its own, by the part of the piece that has passed.
SHAPES: dict[str, Callable[[Array], Array]] = {
  '': jnp.ones_like,
  'cosine': lambda passed: (1 - jnp.cos(jnp.pi * passed)) / 2,
  'linear': lambda passed: passed,
}


class Piece(NamedTuple):
  """From which fraction of the run, what value, and how it is reached: a row of SHAPES."""

  start: float
  value: float
  shape: str = ''


def pieces(spec: str | float) -> list[Piece]:
  """'1, cosine 0.1@60%' -> [(0, 1, ''), (0.6, 0.1, 'cosine')].

  Raises:
    ValueError: it is not of that form.
  """
  found = []
  for i, piece in enumerate(str(spec).split(',')):
    words, at, start = piece.strip().partition('@')
    *shape, value = words.split()  # ValueError where there is none
    shape = ' '.join(shape)
    # The first piece has nothing before it that it could start from.
    if (
      bool(at) != bool(i)
      or (at and not start.endswith('%'))
      or shape not in SHAPES
      or (shape and not i)
    ):
      raise ValueError(spec)
    found.append(Piece(float(start[:-1]) / 100 if at else 0.0, float(value), shape))
  starts = [piece.start for piece in found]
  usable = all(
    0 <= start <= 1 and 0 <= value < float('inf') for start, value, _ in found
  )  # False for nan, too
  if not usable or starts != sorted(starts):
    raise ValueError(spec)
  return found


def schedule_problem(field: str, spec: str | float) -> str:
  """What is wrong with a schedule, '' if nothing."""
  try:
    pieces(spec)
  except ValueError:
    return (
      f'{field}={spec!r} is not a schedule: use a number of 0 or more, or values with the part of the run '
      "from which each holds, such as '0.1, 0.01@10%, 0.001@70%', or with a slope that ends where the next one "
      "begins, such as '1, cosine 0.1@60%, 0.1@90%'"
    )
  return ''


def piecewise(spec: str | float, steps: int) -> Schedule:
  """step -> value, f32. A piece without a shape is its value from its first step on."""
  starts, values, shapes = zip(*pieces(spec))
  edges = jnp.array([round(start * steps) for start in starts] + [steps], jnp.int32)
  values = jnp.array(values, jnp.float32)

  def at(step: Array) -> Array:
    piece = (step >= edges[1:-1]).sum()
    length = jnp.maximum(edges[piece + 1] - edges[piece], 1)
    passed = jnp.clip((step - edges[piece]) / length, 0, 1)
    part = jnp.stack([SHAPES[shape](passed) for shape in shapes])[piece]
    # Not before + part * (value - before): that is not exactly the value where part is 1.
    return (1 - part) * values[jnp.maximum(piece - 1, 0)] + part * values[piece]

  return at
