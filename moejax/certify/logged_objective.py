"""Line 4, on whole training steps: the value that is logged is the value that is differentiated.

  each leaf of each layer, moved in a direction of its own -> logged terms -> slopes
  | the gradient of that leaf along the same direction

A gradient that is partly zero has the right slope along itself, so directions are drawn without
looking at it. All is computed in float64, see `in_float64`: then slopes have errors of 1e-9.

Letters: L layers, P parameters of the model, N directions.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.float64 import in_float64
from moejax.certify.oracle.optimizer import schedule_value
from moejax.data.batch import Batch
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state
from moejax.train.step.gradient_interference import interference

TOTAL = 1e-7  # coefficients are float32, all else is float64
# Differences have errors of REACH^2 by cutting, and by rounding of 1e-16 of the objective / REACH:
# 4e-10 of the largest gradient, and 4e-6 of a leaf that is SMALL beside it. At twice the reach, one
# norm's scale of 20 seeds was off by 1.2e-5, and at this one by 3.0e-6.
SLOPE = 1e-5
REACH = 2.5e-5  # how far each entry moves, as a part of its leaf's root mean square
SMALL = 1e-4  # of the largest norm of a leaf's gradient: below it, deviations are parts of this
# Of a leaf's gradient in float32: sums of 100 tokens that may cancel. Of 20 seeds 2.6e-5 at most,
# of a router's noise; a router in bfloat16 is off by a hundred times as much.
NARROW = 5e-5
ATTEMPTS = 8  # to draw a batch and directions along which no token changes its experts
SMOOTH = 1e-5  # the largest second difference of a value where none does; else it is 1e-4


def coefficient_texts(cfg: ExperimentConfig) -> dict[str, str]:
  """Logged term -> the schedule of its coefficient; lm_loss has none."""
  texts = {'z_loss': cfg.loss.z_coef}
  if cfg.model.mtp_depth:
    texts['mtp_loss'] = cfg.loss.mtp_coef
  return texts | {f'balance/{name}': cfg.balance.losses[name] for name in cfg.balance.active()}


def coefficients_at(cfg: ExperimentConfig, step: int) -> dict[str, float]:
  """The coefficient of each logged term at a step, by the oracle; that of lm_loss is 1."""
  texts = coefficient_texts(cfg).items()
  return {'lm_loss': 1.0} | {term: schedule_value(text, cfg.steps, step) for term, text in texts}


def logged_sum(terms: dict[str, float], coefficients: dict[str, float]) -> float:
  """The objective, put together from the terms that were logged."""
  return sum(coef * float(terms[term]) for term, coef in coefficients.items())


def alone_steps(cfg: ExperimentConfig) -> dict[int, str]:
  """The first step of each piece of the schedules -> what is on from there."""
  noisy = cfg.model.moe.router.noisy
  steps = {0: 'all terms'}
  for term in tiny_config.terms_alone(noisy):
    if term != 'mtp_loss' or cfg.model.mtp_depth:
      steps[tiny_config.step_alone(term, noisy)] = f'lm_loss and {term}'
  return steps | {tiny_config.step_alone('', noisy): 'lm_loss'}


class Direction(NamedTuple):
  """A change of one leaf, in one of its layers."""

  name: str
  leaf: str
  change: np.ndarray  # of the shape of the leaf, 0 in other layers


def directions(plan: Plan, model: dict[str, np.ndarray], attempt: int) -> list[Direction]:
  """A random direction in each leaf, and in each layer of a leaf of stacked layers."""
  rng, found = plan.rng(11, attempt), []
  for leaf, value in model.items():
    is_stacked = 'blocks/' in leaf or leaf.startswith('mtp/')
    for layer in range(len(value)) if is_stacked else [-1]:
      change = np.zeros(value.shape)
      where = layer if is_stacked else ...
      size = REACH * max(float(np.sqrt(np.mean(np.square(value)))), 1e-2)
      change[where] = size * rng.normal(size=value[where].shape)
      found.append(Direction(f'{leaf} {layer}' if is_stacked else leaf, leaf, change))
  return found


def terms_program(plan: Plan, cfg: ExperimentConfig, rows: Batch) -> Callable:
  """(state, batch, points [N, P]) -> every logged term at those parameters, [N] each, in float64.

  One point after the other: the model is compiled once.
  """

  def make() -> Callable:
    shapes = tiny.tiny_state_shapes(plan, cfg)
    terms = in_float64(
      lambda before, rows: tiny.terms_of(tiny.one_step(before, rows, cfg, None)[1]), shapes, rows
    )
    leaves, structure = jax.tree.flatten(shapes.model)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def at_point(before: state.TrainState, rows: Batch, point: Array) -> dict[str, Array]:
      parts = jnp.split(point, ends[:-1])
      model = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)]
      return terms(before._replace(model=jax.tree.unflatten(structure, model)), rows)

    return lambda before, rows, points: jax.lax.map(lambda p: at_point(before, rows, p), points)

  return plan.program64(('terms', cfg), make)


class Slopes(NamedTuple):
  """Finite differences of all logged terms, on a batch on which they are smooth."""

  rows: Batch
  along: list[Direction]
  of_terms: dict[str, np.ndarray]  # term -> [N]


def logged_slopes(plan: Plan, cfg: ExperimentConfig, before: state.TrainState) -> Slopes:
  """The slope of every logged term along a direction in every leaf.

  Raises:
    ValueError: a value has a kink along some direction, whatever batch is drawn.
  """
  model = {k: np.asarray(v, np.float64) for k, v in tiny.named_leaves(before.model).items()}
  point = np.concatenate([np.ravel(leaf) for leaf in model.values()])
  for attempt in range(ATTEMPTS):
    rows, along = tiny.batch((plan.seed, 11, attempt)), directions(plan, model, attempt)
    changes = np.zeros((len(along), point.size))
    ends = dict(zip(model, np.cumsum([leaf.size for leaf in model.values()])))
    for change, direction in zip(changes, along):
      end = ends[direction.leaf]
      change[end - direction.change.size : end] = np.ravel(direction.change)
    points = np.concatenate([point[None], point + changes, point - changes])
    values = terms_program(plan, cfg, rows)(before, rows, points)
    slopes, kinks = {}, []
    for name, of_points in values.items():
      above, below = np.split(of_points[1:], 2)
      slopes[name] = (above - below) / 2
      # A token that changes its experts between two points makes a step in the values.
      kinks.append(np.abs(above + below - 2 * of_points[0]).max())
    if max(kinks) < SMOOTH:
      return Slopes(rows, along, slopes)
  raise ValueError(f'values have steps of {max(kinks):.1e} along random directions')


def logged_line(plan: Plan) -> Iterator[Check]:
  """Checks line 4."""
  checks, rich, other = LoggedChecks(), tiny_config.rich_config(), tiny_config.other_config()
  slopes = checks.see_steps(plan, rich, alone_steps(rich))
  yield from check_interference(plan, slopes.rows)
  # Which term is alone when is the same in all configs: here all of them, and the model's alone.
  ends = alone_steps(other).items()
  some = {number: label for number, label in ends if label in ('all terms', 'lm_loss')}
  checks.see_steps(plan, other, some, ', other model')
  if not plan.quick:
    noisy = tiny_config.rich_config(noisy=True)
    checks.see_steps(plan, noisy, alone_steps(noisy), ', noisy router')
  yield from checks.checks()


class LoggedChecks:
  """The worst over all steps."""

  def __init__(self) -> None:
    self.total = Worst('objective against its logged terms', TOTAL, 'relative; float64')
    why = "of the leaf's own gradient; differences in float64"
    self.slopes = Worst('gradient of each leaf against differences', SLOPE, why)
    self.norms = Worst('logged norm of the gradient', TOTAL, 'relative; float64')
    why = "of each leaf's own norm; float32"
    self.narrow = Worst('gradient in float32 against float64', NARROW, why)

  def see_steps(
    self, plan: Plan, cfg: ExperimentConfig, steps: dict[int, str], model: str = ''
  ) -> Slopes:
    """Takes in these steps of a config, by number; returns the slopes of the last one."""
    start = tiny.start_state(plan, cfg)
    for number, label in steps.items():
      before = start._replace(step=jnp.int32(number))
      # Anew for each step: what is random depends on it, and how z_loss weighs the depths.
      slopes = logged_slopes(plan, cfg, before)
      self.see(plan, f'step {number}: {label}{model}', cfg, before, slopes)
      if number:
        # The last step of the piece before: coefficients hold until then.
        last = start._replace(step=jnp.int32(number - 1))
        result = tiny.take_step64(plan, cfg, last, slopes.rows)
        self.see_objective(f'step {number - 1}{model}', result, coefficients_at(cfg, number - 1))
    return slopes

  def see(
    self,
    plan: Plan,
    where: str,
    cfg: ExperimentConfig,
    before: state.TrainState,
    slopes: Slopes,
  ) -> None:
    """Takes in a step."""
    coefficients = coefficients_at(cfg, int(before.step))
    result = tiny.take_step64(plan, cfg, before, slopes.rows)
    self.see_objective(where, result, coefficients)
    gradient = tiny.leaf_gradients(result, cfg)
    self.see_slopes(where, gradient, slopes, coefficients)
    flat = np.concatenate([np.ravel(g) for g in gradient.values()])
    self.norms.see(where, float(result.metrics['grad_norm']) / np.linalg.norm(flat) - 1)
    if before.step == 0:
      in_float32 = tiny.leaf_gradients(tiny.take_step(plan, cfg, before, slopes.rows), cfg)
      for leaf, wide in gradient.items():
        error = np.linalg.norm(in_float32[leaf] - wide) / np.linalg.norm(wide)
        self.narrow.see(f'{leaf}; {where}', float(error))

  def see_objective(
    self, where: str, result: tiny.StepResult, coefficients: dict[str, float]
  ) -> None:
    """Takes in the objective of a step, which its logged terms must add up to."""
    ratio = float(result.metrics['loss']) / logged_sum(result.terms, coefficients)
    self.total.see(where, ratio - 1)

  def see_slopes(
    self,
    where: str,
    gradient: dict[str, np.ndarray],
    slopes: Slopes,
    coefficients: dict[str, float],
  ) -> None:
    """Takes in the gradient of every leaf along the direction of its own."""
    floor = SMALL * max(np.linalg.norm(g) for g in gradient.values())
    for i, (name, leaf, change) in enumerate(slopes.along):
      g, moved = gradient[leaf], change != 0
      size = float(np.sqrt(np.square(change[moved]).mean()))
      wanted = sum(coef * slopes.of_terms[term][i] for term, coef in coefficients.items()) / size
      # What a random direction sees of a gradient is about its norm.
      seen = max(float(np.linalg.norm(g[moved])), abs(wanted), floor)
      self.slopes.see(f'{name}; {where}', ((g * change).sum() / size - wanted) / seen)

  def checks(self) -> Iterator[Check]:
    """The checks over all steps that were seen."""
    for worst in (self.total, self.slopes, self.norms, self.narrow):
      yield worst.check()


def check_interference(plan: Plan, rows: Batch) -> Iterator[Check]:
  """Checks the meter of interference against gradients of steps with balance losses and without."""
  worst = Worst('interference of balance with the language model', 5e-6, 'absolute; float32')
  cfg = tiny_config.rich_config()
  start = tiny.start_state(plan, cfg)
  alone = tiny_config.step_alone('balance/global_batch')
  with_loss, without = (
    tiny.leaf_gradients(tiny.take_step64(plan, cfg, start._replace(step=jnp.int32(n)), rows), cfg)
    for n in (alone, tiny_config.step_alone(''))
  )
  program = plan.program(lambda before, rows: interference(before, rows, cfg))
  found = program(start._replace(step=jnp.int32(alone)), rows)
  for place in ('router', 'trunk'):
    names = [name for name in without if ('moe/router' in name) is (place == 'router')]
    lm = np.concatenate([np.ravel(without[name]) for name in names])
    balance = np.concatenate([np.ravel(with_loss[name] - without[name]) for name in names])
    norms = np.linalg.norm(balance), np.linalg.norm(lm)
    cosine = float(balance @ lm / (norms[0] * norms[1]))
    worst.see(f'cosine at the {place}', float(found[f'{place}_cosine']) - cosine)
    ratio = float(found[f'{place}_ratio']) / (norms[0] / norms[1])
    worst.see(f'ratio at the {place}, relative', ratio - 1)
  yield worst.check()
