"""A function of moejax in float64: the same operations, one by one, as it was traced in float32.

  function -> its jaxpr -> each operation again, every float of 64 bits

moejax makes its routers, losses and sums in float32 by name, so that wider inputs alone change
nothing. Here the traced program is run anew with every float widened: differences of its values
then have errors of 1e-9, where float32 has 1e-3. Only the precision is another one: the operations,
their order and all integers are the program's own.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core


def in_float64(function: Callable, *examples: object) -> Callable:
  """Returns `function` computed in float64. To be called inside `jax.enable_x64(True)`.

  Args:
    function: of trees of arrays; what it does not need for its results is not computed.
    examples: arguments, or their shapes: the function is traced for these shapes, in float32.
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
  structure = jax.tree.structure(shapes)

  def widened(*args: object) -> object:
    flat = [widen(leaf) for leaf in jax.tree.leaves(args)]
    return jax.tree.unflatten(structure, run(closed.jaxpr, closed.consts, flat))

  return widened


def widen(value: Array) -> Array:
  """The value, as float64 if it is a float of another width."""
  value = jnp.asarray(value)
  is_narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype != jnp.float64
  return value.astype(jnp.float64) if is_narrow else value


def run(jaxpr: core.Jaxpr, consts: Sequence[Array], args: Sequence[Array]) -> list[Array]:
  """The results of a jaxpr, in float64."""
  values: dict[core.Var, Array] = dict(zip(jaxpr.constvars, map(widen, consts)))
  values |= dict(zip(jaxpr.invars, args, strict=True))

  def read(atom: core.Var | core.Literal) -> Array:
    return widen(atom.val) if isinstance(atom, core.Literal) else values[atom]

  for equation in needed(jaxpr):
    results = apply(equation, [read(atom) for atom in equation.invars])
    values.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """The equations that the results follow from, in their order."""
  wanted = {id(atom) for atom in jaxpr.outvars}
  kept = []
  for equation in reversed(jaxpr.eqns):
    if equation.effects or any(id(var) in wanted for var in equation.outvars):
      kept.append(equation)
      wanted.update(id(atom) for atom in equation.invars)
  return kept[::-1]


def apply(equation: core.JaxprEqn, args: list[Array]) -> list[Array]:
  """One operation, in float64."""
  name, params = equation.primitive.name, equation.params
  if name in LOOPS:
    return LOOPS[name](params, args)
  # Calls of other jaxprs: those of jit, of jax.checkpoint and of functions with derivatives of
  # their own, which are not used here.
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    if key in params:
      inner = params[key]
      closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
      return run(closed.jaxpr, closed.consts, args)
  if name in BY_BITS:
    # The bits of a float are those of its own width.
    args = [arg.astype(atom.aval.dtype) for arg, atom in zip(args, equation.invars)]
  elif name.startswith('scatter'):
    # It holds a jaxpr of its own, which is traced anew.
    return [scatter(name, params, args)]
  else:
    params = params | {key: jnp.dtype('float64') for key in narrow_dtypes(params)}
  results = equation.primitive.bind(*args, **params)
  results = results if equation.primitive.multiple_results else [results]
  return [result if is_key(result) else widen(result) for result in results]


def is_key(value: Array) -> bool:
  """Whether the value is a random key, which no other dtype has."""
  return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def narrow_dtypes(params: dict[str, object]) -> list[str]:
  """The names of parameters that ask for floats of another width."""
  names = []
  for key in ('new_dtype', 'dtype', 'preferred_element_type'):
    if key in params and params[key] is not None and jnp.issubdtype(params[key], jnp.floating):
      names.append(key)
  return names


def scatter(name: str, params: dict[str, object], args: list[Array]) -> Array:
  """A scatter, by its public function."""
  kept = ('dimension_numbers', 'indices_are_sorted', 'unique_indices', 'mode')
  named = {key: params[key] for key in kept}
  function = getattr(jax.lax, name.replace('-', '_'))
  return function(*args, **named)


def scan_parts(params: dict[str, object], args: list[Array]) -> list[list[Array]]:
  """The arguments of a scan: constants, what is carried, and what is scanned."""
  if 'ft_in' in params:  # JAX 0.11 keeps a tree of the three
    return [list(part) for part in params['ft_in'].update(args).unpack()]
  first, num_carry = params['num_consts'], params['num_carry']
  second = first + num_carry
  return [args[:first], args[first:second], args[second:]]


def scan(params: dict[str, object], args: list[Array]) -> list[Array]:
  """A scan."""
  consts, carry, xs = scan_parts(params, args)
  body, num_carry = params['jaxpr'], len(carry)

  def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
    results = run(body.jaxpr, body.consts, [*consts, *carry, *x])
    return results[:num_carry], results[num_carry:]

  carry, ys = jax.lax.scan(
    step,
    carry,
    xs,
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys]


def while_loop(params: dict[str, object], args: list[Array]) -> list[Array]:
  """A while loop."""
  first, second = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
  of_cond, of_body = args[:first], args[first:second]
  cond, body = params['cond_jaxpr'], params['body_jaxpr']
  return jax.lax.while_loop(
    lambda carry: run(cond.jaxpr, cond.consts, [*of_cond, *carry])[0],
    lambda carry: run(body.jaxpr, body.consts, [*of_body, *carry]),
    args[second:],
  )


def cond(params: dict[str, object], args: list[Array]) -> list[Array]:
  """A conditional."""

  def branch_of(closed: core.ClosedJaxpr) -> Callable[..., list[Array]]:
    return lambda *operands: run(closed.jaxpr, closed.consts, operands)

  branches = [branch_of(closed) for closed in params['branches']]
  return jax.lax.switch(args[0], branches, *args[1:])


LOOPS = {'scan': scan, 'while': while_loop, 'cond': cond}
BY_BITS = ('bitcast_convert_type',)
