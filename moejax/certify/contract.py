"""The ten lines of the contract, by name, and a certificate that is made of them.

names -> each line's checks, as they finish -> results -> Certificate
"""

import importlib.metadata
import math
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax

import moejax
from moejax.certify.bias_rules import bias_line
from moejax.certify.cases import Plan
from moejax.certify.causality import causality_line
from moejax.certify.equations import oracle_line
from moejax.certify.invariance import invariance_line, layers_line, logged_line
from moejax.certify.properties import balance_line, padding_line, probabilities_line, shrink_line
from moejax.certify.report import Certificate, Check, Result
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DISPATCHERS
from moejax.moe.routing import SCORE_FNS
from moejax.moe.selection import SELECTIONS

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


class Line(NamedTuple):
  """A promise, and what tries to break it: checks, and notes for the reader, as they are found."""

  promise: str
  run: Callable[[Plan], Iterator[Check | str]]


class Listener(Protocol):
  """Who is told of what is found, as it is found."""

  def line(self, name: str, promise: str) -> None:
    """A line begins."""

  def check(self, line: str, check: Check) -> None:
    """A check has finished."""

  def note(self, note: str) -> None:
    """A line has something to say."""


class Silence:
  """Nobody listens."""

  def line(self, name: str, promise: str) -> None:
    """Not said."""

  def check(self, line: str, check: Check) -> None:
    """Not said."""

  def note(self, note: str) -> None:
    """Not said."""


def found_by(name: str, plan: Plan) -> Iterator[Check | str]:
  """What a line finds. An exception is a check that failed: an error in what is looked at is no excuse."""
  try:
    yield from LINES[name].run(plan)
  except Exception as error:
    said = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    yield Check('runs to its end', math.inf, 0, 'an exception is a failure', said, 1)


def run_line(name: str, plan: Plan, listener: Listener) -> Result:
  """All checks of one line."""
  start, checks, notes = time.perf_counter(), [], []
  listener.line(name, LINES[name].promise)
  for found in found_by(name, plan):
    if isinstance(found, str):
      notes.append(found)
      listener.note(found)
    else:
      checks.append(found)
      listener.check(name, found)
  number = list(LINES).index(name) + 1
  return Result(
    name, number, LINES[name].promise, tuple(checks), time.perf_counter() - start, tuple(notes)
  )


def certify(
  names: Sequence[str], quick: bool, seed: int = 0, listener: Listener = Silence()
) -> Certificate:
  """The lines of these names, in the order of the contract."""
  start, plan = time.perf_counter(), Plan(quick, seed)
  results = [run_line(name, plan, listener) for name in LINES if name in names]
  only = [f'--only {name}' for name in names if len(names) < len(LINES)]
  about = {
    'command': ' '.join(['python -m moejax.certify', *['--quick'] * quick, *only]),
    'quick': quick,
    'seed': seed,
    'seconds': round(time.perf_counter() - start, 1),
    'commit': commit(),
    'made': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'devices': f'{jax.device_count()} x {jax.default_backend()}',
    'versions': versions(),
    'covered': covered(plan),
  }
  return Certificate(results, about)


def covered(plan: Plan) -> dict[str, list[str]]:
  """Every row of every registry that the lines go through, and at which sizes."""
  registries = {
    'losses': BALANCE_LOSSES,
    'bias rules': BIAS_RULES,
    'score functions': SCORE_FNS,
    'selections': SELECTIONS,
    'dispatchers': DISPATCHERS,
  }
  shapes = dict.fromkeys(f'E={cfg.num_experts} K={cfg.top_k}' for cfg in plan.token_choice())
  return {name: sorted(rows) for name, rows in registries.items()} | {'shapes': list(shapes)}


def versions() -> dict[str, str]:
  """Of Python, of ours, and of what the numbers depend on."""
  return {'python': platform.python_version(), 'moejax': moejax.__version__} | {
    name: importlib.metadata.version(name) for name in PACKAGES
  }


def commit() -> str:
  """The commit of the source, 'unknown' where git does not say; with '+' where files differ from it."""

  def git(*args: str) -> str:
    return subprocess.run(
      ['git', '-c', 'safe.directory=*', *args],
      capture_output=True,
      text=True,
      check=True,
      cwd=pathlib.Path(moejax.__file__).parent,
    ).stdout.strip()

  try:
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(
      git('status', '--porcelain', '--', '.')
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


LINES: dict[str, Line] = {
  'oracle': Line(
    'every loss, router and bias rule is its equation in float64, every gradient its finite difference',
    oracle_line,
  ),
  'balance': Line(
    "1 at perfect balance for every E, K and score function; other codebases' coefficients convert",
    balance_line,
  ),
  'invariance': Line(
    'dispatcher, mesh, micro-batches, scan, remat, padding, packing and resume change nothing',
    invariance_line,
  ),
  'logged': Line('the value logged is the value differentiated', logged_line),
  'probabilities': Line(
    'probabilities are scores normalised over all experts, and never hold the bias',
    probabilities_line,
  ),
  'bias': Line(
    'the router bias moves once a step, by its rule on global counts, and by nothing else',
    bias_line,
  ),
  'padding': Line(
    'padding counts nowhere; a packed row is the mean of its documents', padding_line
  ),
  'shrink': Line('shrinking all scores pushes no loss below its balanced value', shrink_line),
  'layers': Line('layers enter by one reduction, the mean over MoE layers', layers_line),
  'causality': Line(
    'changing tokens after t changes nothing up to t, except where a router is labelled so',
    causality_line,
  ),
}
