"""Line 4, on whole training steps: the value that is logged is the value that is differentiated.

  state, moved along the gradient | against it -> logged terms -> slope | norm of the gradient

Letters: E experts, L MoE layers.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.invariance import SAME
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state

# Of a slope in float32: rounding of 1e-7 over a difference of 1e-4, and what is not linear.
SLOPE = 1e-2
REACH = 5e-3  # how far the parameters move for a finite difference


def step_coefficients(noisy: bool) -> dict[int, dict[str, float]]:
  """Step number -> the coefficient of each logged term but lm_loss, as the schedules have it."""
  together = {'z_loss': 1e-3}
  for name in tiny.loss_names(noisy):
    if name not in tiny.CUT_DEPENDENT:
      together[f'balance/{name}'] = 0.1
  coefficients = {0: together}
  for name in tiny.loss_names(noisy):
    coefficients[tiny.step_alone(name, noisy)] = {f'balance/{name}': tiny.WEIGHT}
  # After the last loss was alone there is none.
  coefficients[max(coefficients) + tiny.ALONE_STEPS] = {}
  return coefficients


def logged_sum(result: tiny.StepResult, coefficients: dict[str, float]) -> float:
  """The objective, put together from the terms that were logged."""
  return result.terms['lm_loss'] + sum(
    coef * result.terms[term] for term, coef in coefficients.items()
  )


def logged_line(plan: Plan) -> Iterator[Check]:
  """Checks line 4."""
  total = Worst(
    'objective against its logged terms', SAME, 'relative; a sum of ten float32 numbers'
  )
  slopes = Worst(
    'slope of what is logged along the gradient',
    SLOPE,
    f'relative; differences in float32 over a step of {REACH}',
  )
  for noisy in (False,) if plan.quick else (False, True):
    cfg = tiny.config(noisy)
    cfg = tiny.change(cfg, balance=dataclasses.replace(cfg.balance, assignment='dispatched'))
    start = with_deciding_bias(tiny.start_state(plan, cfg))
    for step, coefficients in step_coefficients(noisy).items():
      start = start._replace(step=jnp.int32(step))
      result = tiny.take_step(plan, cfg, start, tiny.batch())
      where = f'lm_loss and {" ".join(coefficients) or "no other"}'
      if noisy:
        where += ', noisy router'
      total.see(where, float(result.metrics['loss']) / logged_sum(result, coefficients) - 1)
      gradient = tiny.gradient(result, cfg)
      norm = float(np.linalg.norm(gradient))
      slope = finite_slope(plan, cfg, start, REACH / norm * gradient, coefficients)
      slopes.see(where, slope / norm - 1)
  yield total.check()
  yield slopes.check()


def finite_slope(
  plan: Plan,
  cfg: ExperimentConfig,
  start: state.TrainState,
  by: np.ndarray,
  coefficients: dict[str, float],
) -> float:
  """The slope of the logged objective along `by`, a vector of length REACH, by a difference."""
  above, below = (
    logged_sum(
      tiny.take_step(plan, cfg, move_parameters(start, sign * by), tiny.batch()), coefficients
    )
    for sign in (1, -1)
  )
  return (above - below) / (2 * REACH)


def with_deciding_bias(before: state.TrainState) -> state.TrainState:
  """A bias that decides every choice, another in each layer.

  f, which has no gradient, is then constant however the parameters move.
  """
  num_layers, experts = before.router.bias.shape
  order = (jnp.arange(experts) + jnp.arange(num_layers)[:, None]) % experts
  return before._replace(router=before.router._replace(bias=10.0 * order))


def move_parameters(before: state.TrainState, by: np.ndarray) -> state.TrainState:
  """A state whose parameters are a vector further; `by` has one entry for each of them."""
  leaves, tree = jax.tree.flatten(before.model)
  ends = np.cumsum([leaf.size for leaf in leaves])
  parts = np.split(np.asarray(by, np.float32), ends[:-1])
  moved = [leaf + part.reshape(leaf.shape) for leaf, part in zip(leaves, parts)]
  return before._replace(model=jax.tree.unflatten(tree, moved))
