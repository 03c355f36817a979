"""What a run would take, before anybody pays for devices: `train.py --plan --topology=NAME`.

  config, topology -> the real training step, compiled ahead of time -> memory, collectives, the
  least time of a step

It is ahead-of-time compilation, no accelerator needed: nothing is allocated and no data is read.
With --plan=fit the mesh, remat and number of micro-batches are looked for, and the best are
compiled until one fits.
"""

import contextlib
import dataclasses
import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from jax.stages import Compiled

from moejax.config import ConfigError, check, problem_if
from moejax.data.tokenizer import SMALLEST_BPE
from moejax.plan.memory_model import memory_by_kind, model_shapes
from moejax.plan.report import (
  PLAN_MEMORY_FRACTION,
  CompiledStep,
  describe_layout,
  fits,
  needed_bytes,
  plan_lines,
)
from moejax.plan.search import Guess, candidates
from moejax.plan.topology import Topology
from moejax.runtime.command import usage_error
from moejax.runtime.units import human
from moejax.sharding.mesh import resolve_mesh
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.cost import count_parameters
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_step import compile_step

FITS, DOES_NOT_FIT = 0, 2  # exit statuses; 2 is a bad config's, too
MAX_COMPILES = 3  # programs that --plan=fit compiles before it gives up
CORRECTION_MARGIN = 1.02  # corrected guesses err a little on the large side
SHOWN_CANDIDATES = 5
CLOCK_SECONDS = 15  # between two lines that tell how long a compile has taken
# Two wordings of compilers, each with a number and the letter of its unit.
OUT_OF_MEMORY = re.compile(r'\(?(\d[\d.]*)([KMGT])i?B?\)? exceeds|Used ([\d.]+)([KMGT])')


def print_plan(cfg: ExperimentConfig, mode: str, topology: Topology) -> int:
  """Prints the plan of a config ('once') or of the best one near it ('fit'); the exit status."""
  try:
    devices, cfg = topology.devices(), with_known_vocabulary(cfg)
    cfg = dataclasses.replace(cfg, mesh=resolve_mesh(cfg.mesh, len(devices)))
    compile_plan = compile_best_fit if mode == 'fit' else compile_on
    step = compile_plan(cfg, devices, topology)
  except ConfigError as error:
    print(usage_error('moejax.plan', error), file=sys.stderr)
    return DOES_NOT_FIT
  print('\n'.join(plan_lines(step, topology)), flush=True)
  return FITS if fits(step, topology) else DOES_NOT_FIT


def with_known_vocabulary(cfg: ExperimentConfig) -> ExperimentConfig:
  """Returns the config with the vocabulary that its tokenizer will have.

  Raises:
    ConfigError: only a look at a file would tell.
  """
  if cfg.model.vocab_size:
    return cfg
  kind, _, size = cfg.data.tokenizer.partition(':')
  known = {'bytes': SMALLEST_BPE, 'bpe': int(size or 0)}
  check(
    problem_if(
      kind not in known,
      f'config.model.vocab_size=0 is that of data.tokenizer={cfg.data.tokenizer!r}, and a plan '
      'reads no data: give --config.model.vocab_size=N',
    )
  )
  return with_vocabulary(cfg, known[kind])


def compile_on(
  cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology
) -> CompiledStep:
  """Returns the training step of a config, compiled for these devices.

  Raises:
    ConfigError: the mesh does not divide the devices, the batch or the model.
  """
  mesh = make_run_mesh(cfg, devices)
  with jax.set_mesh(mesh):
    target = sharded_state_shapes(cfg, mesh)
    parameters = count_parameters(target.model, cfg)
    state = {
      'parameters': bytes_on_device(target.model, mesh),
      'optimiser': bytes_on_device(target.opt_state, mesh),
    }
    guess = memory_by_kind(cfg, model_shapes(cfg), topology)
    try:
      with report_progress(f'compiling the step on {describe_layout(cfg)} for {topology.text}'):
        program = compile_step(cfg, target, batch_shapes(cfg, mesh))
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      memory = state | {'temporaries, as the compiler refused them': refused_bytes(error)}
      return CompiledStep(cfg, mesh, parameters, memory, text='')
  memory = state | memory_beside_state(program, state, guess)
  return CompiledStep(cfg, mesh, parameters, memory, program.as_text())


def memory_beside_state(
  program: Compiled, state: dict[str, int], guess: dict[str, float]
) -> dict[str, float]:
  """Returns kind -> bytes on one device of all but parameters and optimiser.

  The compiler tells temporaries as one number. It is split as the guess has it, as far as it goes.
  """
  sizes = program.memory_analysis()
  kinds: dict[str, float] = {}
  rest = float(sizes.temp_size_in_bytes)
  for kind in ('gradients', 'activations'):
    kinds[kind] = min(rest, guess[kind])
    rest -= kinds[kind]
  # What is donated is one with its result, and counted among the arguments.
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return kinds | {
    'other temporaries': rest,
    'batch and rest of the state': sizes.argument_size_in_bytes
    - (state['parameters'] + state['optimiser']),
    'results and program': results + sizes.generated_code_size_in_bytes,
  }


def refused_bytes(error: Exception) -> float:
  """Returns the bytes of temporaries that a compiler wanted; NaN where its message does not say."""
  match = OUT_OF_MEMORY.search(str(error))
  if not match:
    return math.nan
  number, unit = filter(None, match.groups())  # those of the alternative that matched
  return float(number) * 1024 ** ' KMGT'.index(unit)


@contextlib.contextmanager
def report_progress(what: str) -> Iterator[None]:
  """Tells on stderr what takes long, and how long it has taken."""
  start, done = time.monotonic(), threading.Event()

  def clock() -> None:
    while not done.wait(CLOCK_SECONDS):
      print(f'  ... {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)

  print(what, file=sys.stderr, flush=True)
  # A daemon, so that it never keeps a process alive.
  thread = threading.Thread(target=clock, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    print(f'  took {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)


def compile_best_fit(
  cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology
) -> CompiledStep:
  """Returns the fastest candidate that the compiler finds to fit, else the last of MAX_COMPILES.

  What a compiler needed beside the guess is added to the guesses of those that are still to be
  tried.
  """
  with report_progress(f'looking for a mesh of {len(devices)} devices, remat and micro-batches'):
    waiting = candidates(cfg, devices, topology)
  print(f'{len(waiting)} candidates should fit; the fastest:', file=sys.stderr)
  for guess in waiting[:SHOWN_CANDIDATES]:
    size = human(sum(guess.memory.values()), 1024)
    print(f'  {describe_layout(guess.cfg)}: {size}B, {guess.seconds:.3g} s', file=sys.stderr)
  factor = 1.0
  limit = PLAN_MEMORY_FRACTION * topology.chip.memory if topology.chip else math.inf
  for _ in range(MAX_COMPILES):
    fitting = [guess for guess in waiting if corrected_bytes(guess, factor) <= limit]
    guess, *waiting = fitting or waiting[-1:]
    step = compile_on(guess.cfg, devices, topology)
    if fits(step, topology) or not waiting:
      break
    needed, state = needed_bytes(step), state_bytes(guess)
    measured = (needed - state) / (sum(guess.memory.values()) - state)
    factor = max(factor, measured) * CORRECTION_MARGIN
    print(f'  does not fit: it needs {human(needed, 1024)}B', file=sys.stderr)
  return step


def state_bytes(guess: Guess) -> float:
  """Returns the bytes of parameters and optimiser in a guess, which are exact."""
  return guess.memory['parameters'] + guess.memory['optimiser']


def corrected_bytes(guess: Guess, factor: float) -> float:
  """Returns the bytes of a guess whose temporaries are `factor` times as large."""
  state = state_bytes(guess)
  return state + factor * (sum(guess.memory.values()) - state)
