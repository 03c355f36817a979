"""The lines of the contract, by name, and a certificate that is made of them.

names -> each line's checks, as they finish -> results -> Certificate
"""

import concurrent.futures
import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax

from moejax.certify.bias_rules import bias_line
from moejax.certify.cases import Plan
from moejax.certify.causality import causality_line
from moejax.certify.checks import Certificate, Check, Result, worse
from moejax.certify.decoding import decoding_line
from moejax.certify.equations import oracle_line
from moejax.certify.invariance import invariance_line
from moejax.certify.large_numbers import large_line
from moejax.certify.layer_mean import layers_line
from moejax.certify.logged_objective import logged_line
from moejax.certify.padding import padding_line
from moejax.certify.perfect_balance import balance_line, shrink_line
from moejax.certify.probabilities import probabilities_line
from moejax.certify.provenance import commit, versions
from moejax.certify.step_metrics import metrics_line
from moejax.certify.trained import trained_line
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch.dispatchers import DISPATCHERS
from moejax.moe.routing import SCORE_FNS
from moejax.moe.selection import SELECTIONS

UNEXPECTED = 'runs to its end'  # the check that a line fails when it raises
# These begin first, so that no process is left with one of them when the others are done.
LONGEST = ('logged', 'invariance', 'oracle', 'trained', 'metrics', 'layers')


class Line(NamedTuple):
  """A promise, and what tries to break it."""

  promise: str
  run: Callable[[Plan], Iterator[Check | str]]  # checks, and notes for the reader, as they finish


class Listener(Protocol):
  """What is told of each finding as it is made."""

  def line(self, name: str, promise: str) -> None:
    """A line begins."""

  def check(self, line: str, check: Check) -> None:
    """A check has finished."""

  def note(self, note: str) -> None:
    """A line has something to say besides its checks."""


class Silence:
  """A listener that says nothing."""

  def line(self, name: str, promise: str) -> None:
    """Does nothing."""

  def check(self, line: str, check: Check) -> None:
    """Does nothing."""

  def note(self, note: str) -> None:
    """Does nothing."""


def findings(name: str, plan: Plan) -> Iterator[Check | str]:
  """What a line finds. An exception is a check that failed: an error in moejax is no excuse."""
  try:
    yield from LINES[name].run(plan)
  except Exception as error:
    said = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    why = 'an exception is a failure'
    yield Check(UNEXPECTED, worst=math.inf, tolerance=0, why=why, where=said, cases=1)


def run_line(name: str, plan: Plan, listener: Listener, seeds: Sequence[int] = ()) -> Result:
  """All checks and notes of one line, and how many seconds they took.

  seeds: to run the line with, in turn; none: the plan's own. Of several each check is the worst.
  """
  start, checks, notes = time.perf_counter(), {}, []
  listener.line(name, LINES[name].promise)
  for seed in seeds or [plan.seed]:
    for finding in findings(name, plan.with_seed(seed)):
      if isinstance(finding, Check):
        found = finding._replace(where=f'{finding.where}; seed {seed}' if seed else finding.where)
        checks[found.what] = worse(checks[found.what], found) if found.what in checks else found
      elif finding not in notes and seed == (seeds or [plan.seed])[0]:
        notes.append(finding)
        listener.note(finding)
  for check in checks.values():
    listener.check(name, check)
  return Result(
    name=name,
    number=list(LINES).index(name) + 1,
    promise=LINES[name].promise,
    checks=tuple(checks.values()),
    seconds=time.perf_counter() - start,
    notes=tuple(notes),
  )


@functools.cache
def plan_of_process(quick: bool, seed: int) -> Plan:
  """The plan that all lines of one process share: its programs are compiled once."""
  return Plan(quick, seed)


def run_in_process(name: str, quick: bool, seeds: Sequence[int]) -> Result:
  """`run_line`, where nobody listens."""
  return run_line(name, plan_of_process(quick, seeds[0]), Silence(), seeds)


def run_lines(
  names: Sequence[str], quick: bool, seeds: Sequence[int], listener: Listener, workers: int
) -> list[Result]:
  """The results of lines that run in so many processes, in the order of the contract.

  The listener is told of each line when it has ended.

  Raises:
    concurrent.futures.process.BrokenProcessPool: a process was killed.
  """
  order = [name for name in (*LONGEST, *LINES) if name in names]
  # Not forked: jax has threads, which a fork leaves behind.
  spawning = multiprocessing.get_context('spawn')
  results = {}
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawning) as pool:
    running = [pool.submit(run_in_process, name, quick, seeds) for name in dict.fromkeys(order)]
    for ended in concurrent.futures.as_completed(running):
      result = ended.result()
      results[result.name] = result
      listener.line(f'{len(results)} of {len(names)} lines', 'have ended')
      for check in result.checks:
        listener.check(result.name, check)
      for note in result.notes:
        listener.note(note)
  return [results[name] for name in LINES if name in results]


def certify(
  names: Sequence[str],
  quick: bool,
  seeds: Sequence[int] = (0,),
  listener: Listener = Silence(),
  workers: int = 1,
) -> Certificate:
  """The certificate of the lines of these names, in the order of the contract.

  workers: processes that share the lines; 1: this one runs them, in turn.
  """
  start, plan = time.perf_counter(), Plan(quick, seeds[0])
  if workers > 1:
    results = run_lines(names, quick, seeds, listener, workers)
  else:
    results = [run_line(name, plan, listener, seeds) for name in LINES if name in names]
  only = [f'--only {name}' for name in names if len(names) < len(LINES)]
  drawn = [f'--seed {seeds[0]}'] * (seeds[0] > 0) + [f'--seeds {len(seeds)}'] * (len(seeds) > 1)
  about = {
    'command': ' '.join(['python -m moejax.certify', *['--quick'] * quick, *only, *drawn]),
    'quick': quick,
    'seed': seeds[0] if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}',
    'seconds': round(time.perf_counter() - start, 1),
    'commit': commit(),
    'made': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'devices': f'{jax.device_count()} x {jax.default_backend()}',
    'versions': versions(),
    'covered': registry_names(plan),
  }
  return Certificate(results, about)


def registry_names(plan: Plan) -> dict[str, list[str]]:
  """The names in every registry that the lines go through, and the sizes at which they do."""
  registries = {
    'losses': BALANCE_LOSSES,
    'bias rules': BIAS_RULES,
    'score functions': SCORE_FNS,
    'selections': SELECTIONS,
    'dispatchers': DISPATCHERS,
  }
  names = {registry: sorted(rows) for registry, rows in registries.items()}
  # Each size once, in the order of the plan.
  shapes = dict.fromkeys(f'E={cfg.num_experts} K={cfg.top_k}' for cfg in plan.token_choice())
  return names | {'shapes': list(shapes)}


LINES: dict[str, Line] = {
  'oracle': Line(
    'every loss, router and bias rule is its equation in float64, every gradient its finite '
    'difference',
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
  'trained': Line(
    'what is trained moves by the optimiser and its schedules, and nothing else does', trained_line
  ),
  'decoding': Line(
    'decoding is the forward pass, with a cache or without, with drafts or without', decoding_line
  ),
  'large': Line(
    'sort keys past 2^31, counts past 2^24, blocks of every remainder, buffers that overflow',
    large_line,
  ),
  'metrics': Line(
    'what is logged of a step is of the whole batch: each layer, token and copy once', metrics_line
  ),
}
