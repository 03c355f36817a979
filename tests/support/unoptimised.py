"""The package's own programs, compiled without XLA's optimisation for as long as a block lasts.

Most tests run a program a few times, so that compiling it is all the time that they take.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax

from moejax.data.batch import Batch
from moejax.inference.decode import prefill, step
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import train_step
from tests.support.quick import QUICK

# What decodes a prompt, and its next tokens: jitted again, with the same donated arguments.
DECODING = {
  'prefill': jax.jit(prefill.__wrapped__, donate_argnums=3, compiler_options=QUICK),
  'step': jax.jit(step.__wrapped__, donate_argnums=2, compiler_options=QUICK),
}


def compile_step_unoptimised(
  cfg: ExperimentConfig, state: TrainState, batch: Batch
) -> jax.stages.Compiled:
  """`compile_step`, in a fifth of the time."""
  jitted = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0, compiler_options=QUICK)
  return jitted.lower(state, batch).compile()


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
  """The training step and decoding compile without optimisation inside of this block."""
  with (
    mock.patch('moejax.train.compile.compile_step', compile_step_unoptimised),
    mock.patch.multiple('moejax.inference.sampling', **DECODING),
  ):
    yield
