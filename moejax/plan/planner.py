"""What a run would take on devices that are not here, before anybody pays for them: `train.py --plan --topology=NAME`.

  config, topology -> the real training step, compiled ahead of time -> memory, collectives, the least time of a step

Nothing is allocated and no data is read. With --plan=fit the mesh, remat and number of micro-batches are looked for,
and the best are compiled until one fits.
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

from moejax.config import ConfigError, check
from moejax.data.tokenizer import SMALLEST_BPE
from moejax.plan.memory_model import memory, shapes
from moejax.plan.report import (
  PLAN_MEMORY_FRACTION,
  Compiled,
  describe_layout,
  fits,
  plan_lines,
  total,
)
from moejax.plan.search import Guess, candidates
from moejax.plan.topology import Topology
from moejax.runtime.units import human
from moejax.sharding.mesh import resolve_mesh as resolved_mesh
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.cost import count_parameters
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_step import compile_step

FITS, DOES_NOT = 0, 2  # exit statuses; 2 is a bad config's, too
COMPILED = 3  # programs that --plan=fit compiles before it gives up
OUT_OF_MEMORY = re.compile(r'\(?(\d[\d.]*)([KMGT])i?B?\)? exceeds|Used ([\d.]+)([KMGT])')


def print_plan(cfg: ExperimentConfig, mode: str, topology: Topology) -> int:
  """Prints the plan of a config ('once'), or of the best that is found near it ('fit'). Returns the exit status."""
  try:
    devices, cfg = topology.devices(), with_known_vocabulary(cfg)
    cfg = dataclasses.replace(cfg, mesh=resolved_mesh(cfg.mesh, len(devices)))
    done = fit(cfg, devices, topology) if mode == 'fit' else compiled(cfg, devices, topology)
  except ConfigError as error:
    print(f'no plan; mend this and try again:\n{error}', file=sys.stderr)
    return DOES_NOT
  print('\n'.join(plan_lines(done, topology)), flush=True)
  return FITS if fits(done, topology) else DOES_NOT


def with_known_vocabulary(cfg: ExperimentConfig) -> ExperimentConfig:
  """The config with the vocabulary that its tokenizer will have.

  Raises:
    ConfigError: that takes a look at a file.
  """
  kind, _, size = cfg.data.tokenizer.partition(':')
  known = {'bytes': SMALLEST_BPE, 'bpe': int(size or 0)}
  check(
    ''
    if cfg.model.vocab_size or kind in known
    else f'config.model.vocab_size=0 is that of data.tokenizer={cfg.data.tokenizer!r}, and a plan reads no data: '
    'give --config.model.vocab_size=N'
  )
  return cfg if cfg.model.vocab_size else with_vocabulary(cfg, known[kind])


def compiled(cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology) -> Compiled:
  """The training step of a config, compiled for these devices.

  Raises:
    ConfigError: the mesh does not divide the devices, the batch or the model.
  """
  mesh = make_run_mesh(cfg, devices)
  with jax.set_mesh(mesh):
    target = sharded_state_shapes(cfg, mesh)
    parameters, own = count_parameters(target.model, cfg), bytes_on_device(target.model, mesh)
    known = memory(cfg, shapes(cfg), topology)
    kinds = {'parameters': own, 'optimiser': bytes_on_device(target.opt_state, mesh)}
    try:
      with saying(f'compiling the step on {describe_layout(cfg)} for {topology.text}'):
        step = compile_step(cfg, target, batch_shapes(cfg, mesh))
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return Compiled(
        cfg,
        mesh,
        parameters,
        kinds | {'temporaries, as the compiler refused them': refused(error)},
        '',
      )
  sizes = step.memory_analysis()
  rest = float(sizes.temp_size_in_bytes)
  for kind in ('gradients', 'activations'):
    kinds[kind] = min(rest, known[kind])
    rest -= kinds[kind]
  state = kinds['parameters'] + kinds['optimiser']
  kinds |= {
    'other temporaries': rest,
    'batch and rest of the state': sizes.argument_size_in_bytes - state,
    'results and program': (
      sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.generated_code_size_in_bytes
    ),
  }
  return Compiled(cfg, mesh, parameters, kinds, step.as_text())


def refused(error: Exception) -> float:
  """Bytes of temporaries that a compiler wanted; NaN where it does not say."""
  found = OUT_OF_MEMORY.search(str(error))
  number, unit = [group for group in found.groups() if group] if found else ('nan', 'K')
  return float(number) * 1024 ** (' KMGT'.index(unit))


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
  """Says on stderr what takes long, and how long it has."""
  began, over = time.monotonic(), threading.Event()

  def clock() -> None:
    while not over.wait(15):
      print(f'  ... {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)

  print(what, file=sys.stderr, flush=True)
  thread = threading.Thread(target=clock, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    print(f'  took {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)


def fit(cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology) -> Compiled:
  """The fastest candidate that the compiler finds to fit; where none of COMPILED do, the last.

  What a compiler needed beside the guess is added to the guesses of those that are still to be tried.
  """
  with saying(f'looking for a mesh of {len(devices)} devices, remat and micro-batches'):
    found = candidates(cfg, devices, topology)
  print(f'{len(found)} candidates should fit; the fastest:', file=sys.stderr)
  for one in found[:5]:
    print(
      f'  {describe_layout(one.cfg)}: {human(sum(one.memory.values()), 1024)}B, {one.seconds:.3g} s',
      file=sys.stderr,
    )
  factor, limit = 1.0, PLAN_MEMORY_FRACTION * topology.chip.memory if topology.chip else math.inf
  for _ in range(COMPILED):
    one, *found = [g for g in found if corrected(g, factor) <= limit] or found[-1:]
    done = compiled(one.cfg, devices, topology)
    if fits(done, topology) or not found:
      break
    needed, state = total(done), one.memory['parameters'] + one.memory['optimiser']
    factor = max(factor, (needed - state) / (sum(one.memory.values()) - state)) * 1.02
    print(f'  does not fit: it needs {human(needed, 1024)}B', file=sys.stderr)
  return done


def corrected(one: Guess, factor: float) -> float:
  """Bytes of a guess whose temporaries are so many times what they were thought to be."""
  state = one.memory['parameters'] + one.memory['optimiser']
  return state + factor * (sum(one.memory.values()) - state)
