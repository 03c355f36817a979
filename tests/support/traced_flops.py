"""The floating-point operations of the matrix products in a traced program, run as it says.

What XLA later drops is counted, and loops of a length that is not known are counted once.
"""

import math

from jax.extend import core

SUBPROGRAMS = core.Jaxpr | core.ClosedJaxpr


def product_flops(equation: core.JaxprEqn) -> int:
  """2 for each entry of the result and each number that is summed; 0 of what is no product."""
  if equation.primitive.name not in ('dot_general', 'ragged_dot_general'):
    return 0
  left = equation.invars[0].aval
  result = math.prod(equation.outvars[0].aval.shape)
  if equation.primitive.name == 'dot_general':
    (contracted, _), _ = equation.params['dimension_numbers']
    return 2 * result * math.prod(left.shape[axis] for axis in contracted)
  numbers = equation.params['ragged_dot_dimension_numbers']
  ((contracted, _), _) = numbers.dot_dimension_numbers
  summed = math.prod(left.shape[axis] for axis in contracted)
  # Of a ragged sum each group has only its own part.
  is_ragged_sum = set(numbers.lhs_ragged_dimensions) & set(contracted)
  return 2 * result * summed // (equation.outvars[0].aval.shape[0] if is_ragged_sum else 1)


def traced_flops(program: core.Jaxpr | core.ClosedJaxpr) -> int:
  """Of all products of a program, those of loops as often as they run."""
  jaxpr = program.jaxpr if isinstance(program, core.ClosedJaxpr) else program
  total = 0
  for equation in jaxpr.eqns:
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    inner = [value for value in equation.params.values() if isinstance(value, SUBPROGRAMS)]
    total += product_flops(equation) + times * sum(map(traced_flops, inner))
  return total
