"""The ten lines of the contract, by name, and a certificate that is made of them.

  names -> each line's checks, as they finish -> results -> Certificate
"""

from collections.abc import Callable, Iterator, Sequence
import importlib.metadata
import pathlib
import platform
import subprocess
import time
from typing import NamedTuple, Protocol

import jax

import moejax
from moejax.certify.causality import causality_line
from moejax.certify.equations import oracle_line
from moejax.certify.laws import balance_line, padding_line, probabilities_line, shrink_line
from moejax.certify.plan import Plan
from moejax.certify.report import Certificate, Check, Result
from moejax.moe.balance import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.routing import SCORE_FNS
from moejax.moe.selection import SELECTIONS

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


class Line(NamedTuple):
  """A promise, and what tries to break it: checks, and notes for the reader, as they are found."""

  promise: str
  run: Callable[[Plan], Iterator[Check | str]]


class Listener(Protocol):
  """Who is told of what is found, as it is found."""

  def check(self, line: str, check: Check, seconds: float) -> None:
    """A check has finished."""

  def note(self, note: str) -> None:
    """A line has something to say."""


class Silence:
  """Nobody listens."""

  def check(self, line: str, check: Check, seconds: float) -> None:
    """Not said."""

  def note(self, note: str) -> None:
    """Not said."""


def run_line(name: str, plan: Plan, listener: Listener) -> Result:
  """All checks of one line. A check that raises is one that failed: an error in what it looks at is no excuse."""
  start, checks, notes = time.perf_counter(), [], []
  since = start
  try:
    for found in LINES[name].run(plan):
      if isinstance(found, str):
        notes.append(found)
        listener.note(found)
        continue
      checks.append(found)
      listener.check(name, found, time.perf_counter() - since)
      since = time.perf_counter()
  except Exception as error:
    failed = Check('runs to its end', float('inf'), 0, f'{type(error).__name__}: {" ".join(str(error).split())[:300]}',
                   'an exception', 1)
    checks.append(failed)
    listener.check(name, failed, time.perf_counter() - since)
  number = list(LINES).index(name) + 1
  return Result(name, number, LINES[name].promise, tuple(checks), time.perf_counter() - start, tuple(notes))


def certify(names: Sequence[str], quick: bool, seed: int = 0, listener: Listener = Silence()) -> Certificate:
  """The lines of these names, in the order of the contract."""
  start, plan = time.perf_counter(), Plan(quick, seed)
  results = [run_line(name, plan, listener) for name in LINES if name in names]
  only = [f'--only {name}' for name in names if len(names) < len(LINES)]
  about = {
    'command': ' '.join(['python -m moejax.certify', *['--quick'] * quick, *only]),
    'quick': quick, 'seed': seed, 'seconds': round(time.perf_counter() - start, 1), 'commit': commit(),
    'made': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'devices': f'{jax.device_count()} x {jax.default_backend()}', 'versions': versions(), 'covered': covered()}
  return Certificate(results, about)


def covered() -> dict[str, list[str]]:
  """Every row of every registry that the lines go through."""
  registries = {'losses': BALANCE_LOSSES, 'bias rules': BIAS_RULES, 'score functions': SCORE_FNS,
                'selections': SELECTIONS, 'dispatchers': DISPATCHERS}
  return {name: sorted(rows) for name, rows in registries.items()}


def versions() -> dict[str, str]:
  """Of Python, of ours, and of what the numbers depend on."""
  return {'python': platform.python_version(), 'moejax': moejax.__version__} | {
    name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str:
  """The commit of the source, 'unknown' where git does not say; with '+' where files differ from it."""
  def git(*args: str) -> str:
    return subprocess.run(['git', '-c', 'safe.directory=*', *args], capture_output=True, text=True, check=True,
                          cwd=pathlib.Path(moejax.__file__).parent).stdout.strip()
  try:
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(git('status', '--porcelain', '--', '.'))
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


LINES: dict[str, Line] = {
  'oracle': Line('every loss and every router is its equation in float64, every gradient its finite difference',
                 oracle_line),
  'balance': Line('1 at perfect balance for every E, K and score function; other codebases\' coefficients convert',
                  balance_line),
  'probabilities': Line('probabilities are scores normalised over all experts, and never hold the bias',
                        probabilities_line),
  'padding': Line('padding counts nowhere; a packed row is the mean of its documents', padding_line),
  'shrink': Line('shrinking all scores pushes no loss below its balanced value', shrink_line),
  'causality': Line('changing tokens after t changes nothing up to t, except where a router is labelled so',
                    causality_line),
}
