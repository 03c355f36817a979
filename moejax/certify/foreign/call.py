"""A foreign function: what it asks for by the names of its parameters, and what it returns.

  function -> names of its parameters -> the inputs of a call -> value, gradient | ids, weights

Every fault of a signature or of the first call is an error that names value, field and remedy.

Letters: L layers, B batch, S sequence, E experts, K experts per token.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np

from moejax.certify.foreign.claim import ROUTER, Claim
from moejax.certify.foreign.given import Given
from moejax.config import ConfigError, check, not_one_of, problem_if

DTYPES = ('float32', 'float64')
FLOATS = ('logits', 'bias', 'noise', 'std', 'router')
OFFERED = Given._fields
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Returned(NamedTuple):
  """What a loss returned: its value, and its gradient where it gave one."""

  value: float
  gradient: np.ndarray | None  # of the shape of the claim's subject in Given


class Chosen(NamedTuple):
  """What a router returned."""

  expert_ids: np.ndarray  # [B, S, K]
  weights: np.ndarray  # [B, S, K]


def taken(function: Callable, claim: Claim) -> frozenset[str]:
  """Which of OFFERED the function takes, by the names of its parameters.

  Raises:
    ConfigError: it cannot be called with these alone.
  """
  if not callable(function):
    raise ConfigError(f'function={function!r} cannot be called: use a function of NumPy arrays')
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    remedy = 'wrap it in `def loss(logits, expert_ids, mask): ...`'
    raise ConfigError(f'function={function!r} does not tell its parameters: {remedy}') from None
  if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
    return frozenset(OFFERED)
  named = {parameter.name for parameter in parameters if parameter.kind in BY_NAME}
  problems = []
  for parameter in parameters:
    is_needed = parameter.default is inspect.Parameter.empty
    is_star = parameter.kind is inspect.Parameter.VAR_POSITIONAL
    if is_needed and not is_star and parameter.name not in {*OFFERED} & named:
      problems.append(
        f'parameter {parameter.name!r} of {name_of(function)} is not one of {list(OFFERED)}, which '
        'are given by name: rename it, or give it a default'
      )
  takes = frozenset(named & {*OFFERED})
  subject = 'logits' if claim.like == ROUTER else claim.equation.subject
  missing = subject not in takes
  remedy = f'name one of its parameters {subject}'
  check(*problems, problem_if(missing, f'{name_of(function)} takes no {subject}: {remedy}'))
  return takes


def name_of(function: Callable) -> str:
  """A name of the function for a reader: 'module.name', or what it is."""
  if inspect.isroutine(function):
    module = function.__module__  # None where the source was no module, as a cell of a page
    return f'{module}.{function.__qualname__}' if module else function.__qualname__
  return repr(function)


def read_floats(what: str, values: object) -> np.ndarray:
  """Values that were returned as a float64 array.

  Raises:
    ConfigError: they are no real floating-point numbers that NumPy has.
  """
  try:
    array = np.asarray(values)
  except Exception as error:  # each framework has its own for a tensor that is not on the host
    remedy = 'return NumPy, as of .detach().cpu().numpy()'
    raise ConfigError(f'{what} of type {type(values).__name__}: {remedy}') from error
  if array.dtype.kind != 'f' or array.dtype.itemsize < 4:
    raise ConfigError(f'{what} has dtype {array.dtype}: return float32 or float64')
  return array.astype(np.float64)


def expect_shape(what: str, array: np.ndarray, shape: tuple[int, ...], meaning: str) -> None:
  """Raises ConfigError where an array that was returned has another shape."""
  if array.shape != shape:
    raise ConfigError(f'{what} has shape {array.shape}: return {meaning}, of shape {shape}')


class Foreign:
  """A function that is certified, as a function of Given."""

  def __init__(self, function: Callable, claim: Claim, dtype: str) -> None:
    check(not_one_of('dtype', dtype, DTYPES))
    self.function, self.claim, self.dtype = function, claim, dtype
    self.takes, self.name = taken(function, claim), name_of(function)

  def with_dtype(self, dtype: str) -> 'Foreign':
    """The same function, given floats of another dtype."""
    return Foreign(self.function, self.claim, dtype)

  def _call(self, given: Given) -> object:
    """Whatever the function returns of a copy of the inputs, which it may overwrite."""
    inputs = {}
    for name in self.takes:
      array = getattr(given, name)
      array = array.astype(self.dtype) if name in FLOATS else array.copy()
      is_of_layers = name not in ('mask', 'segment_ids', 'router')
      inputs[name] = array if self.claim.layers or not is_of_layers else array[0]
    return self.function(**inputs)

  def loss(self, given: Given) -> Returned:
    """The value of a loss, and its gradient where the function returns a pair."""
    returned, gradient = self._call(given), None
    value = returned
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
      value, gradient = returned
    value = read_floats('the value', value)
    expect_shape('the value', value, (), 'one number')
    if gradient is not None:
      subject = self.claim.equation.subject
      wanted = getattr(given, subject)
      gradient = read_floats('the gradient', gradient)
      no_axis = subject == 'logits' and not self.claim.layers
      shape = wanted.shape[1:] if no_axis else wanted.shape
      expect_shape('the gradient', gradient, shape, f'the gradient to {subject}')
      gradient = gradient.reshape(wanted.shape)
    return Returned(float(value), gradient)

  def route(self, given: Given) -> Chosen:
    """The experts that a router chooses, and their weights."""
    returned = self._call(given)
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
      found = type(returned).__name__
      raise ConfigError(f'a router returned {found}: return a pair, expert_ids and weights')
    try:
      ids = np.asarray(returned[0])
    except Exception as error:
      raise ConfigError('expert_ids: return NumPy, as of .cpu().numpy()') from error
    weights = read_floats('weights', returned[1])
    shape, experts = given.expert_ids.shape[1:], self.claim.num_experts
    expect_shape('expert_ids', ids, shape, 'the experts of each token')
    expect_shape('weights', weights, shape, 'a weight for each expert')
    if ids.dtype.kind not in 'iu':
      raise ConfigError(f'expert_ids have dtype {ids.dtype}: return integers')
    if ids.min() < 0 or ids.max() >= experts:
      span = f'{ids.min()} to {ids.max()}'
      raise ConfigError(f'expert_ids are {span}: return 0 to {experts - 1}')
    return Chosen(ids.astype(np.int64), weights)

  def probe(self, given: Given) -> None:
    """Calls the function twice on a plain batch, before anything is measured.

    Raises:
      ConfigError: it raises, returns something else than is asked for, or not the same again.
    """
    call = self.route if self.claim.like == ROUTER else self.loss
    results = []
    for _ in range(2):
      try:
        results.append(call(given))
      except ConfigError as error:
        problems = [f'{self.name}: {problem}' for problem in error.problems]
        raise ConfigError(*problems) from error
      except Exception as error:
        self._raised(error, given)
    first, second = results
    for name, one, other in zip(first._fields, first, second):
      if one is None or other is None:  # a loss without a gradient
        continue
      if not np.all(np.isfinite(one)):
        found = 'nan' if np.any(np.isnan(one)) else 'inf'
        raise ConfigError(f'{self.name}: {name} is {found} of plain logits: return finite numbers')
      if not np.array_equal(one, other):
        raise ConfigError(
          f'{self.name}: {name} of the same inputs is another one when it is called again: '
          'fix the seed of what it draws'
        )

  def _raised(self, error: Exception, given: Given) -> NoReturn:
    """Raises what is wrong with a function that raises on plain inputs."""
    shapes = []
    for name in sorted(self.takes):
      shape = getattr(given, name).shape
      is_of_layers = name not in ('mask', 'segment_ids', 'router')
      shapes.append(f'{name} {shape if self.claim.layers or not is_of_layers else shape[1:]}')
    said = ' '.join(str(error).split())[:200]
    raise ConfigError(
      f'{self.name} raised {type(error).__name__}: {said}; given {", ".join(shapes)}, floats of '
      f'dtype={self.dtype!r}: mend it, or wrap it in a function that takes these'
    ) from error


def value_or_nan(foreign: Foreign, given: Given) -> tuple[Returned, str]:
  """What a loss returns, and why it did not: an exception on odd inputs is a failed case."""
  try:
    return foreign.loss(given), ''
  except Exception as error:
    said = ' '.join(str(error).split())[:120]
    return Returned(math.nan, None), f'raised {type(error).__name__}: {said}'
