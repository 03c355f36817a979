"""Compiler options for tests: a program is compiled in a fifth of the time, and runs slower."""

import functools

import jax

from moejax.certify.cases import cheapest
from moejax.data.batch import Batch
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import train_step

QUICK = cheapest()


def compile_step_quickly(
  cfg: ExperimentConfig, state: TrainState, batch: Batch
) -> jax.stages.Compiled:
  """What `compile_step` compiles, with these options; to be put in its place."""
  step = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0, compiler_options=QUICK)
  return step.lower(state, batch).compile()
