"""How a mixture of texts is written: a table of task -> 'WEIGHT SOURCE [ARGUMENT]'.

  --config.data.source=mixture --config.data.mixture.code='0.7 stdlib'
  --config.data.mixture.notes='0.3 text ~/notes/**/*.md, ~/journal.txt'

Sources `text` and `tokens` take globs as their argument and `synthetic` a seed. A weight alone is
of the source with the task's name: --config.data.mixture.kjv=0.3. Weights are parts of the rows;
what they add up to does not matter.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

PATH_SOURCES = ('text', 'tokens')  # which take globs
SOURCE = 'mixture'  # the name of a source that turns the table on
EXAMPLE = "as '0.7 stdlib', '0.2 text notes/**/*.md' or '0.1 synthetic 7'"


class Entry(NamedTuple):
  """An entry of the table, taken apart."""

  weight: float  # nan if it is no number
  source: str
  argument: str  # '' if there is none


def entry_of(task: str, value: str | float) -> Entry:
  """Takes an entry apart; what is wrong with it, `problems` tells.

  Args:
    task: its name, which is also that of the source where the value is a weight alone.
    value: the text, or a weight.
  """
  weight, source, argument = '', task, ''
  words = str(value).split(None, 2)
  if words:
    weight = words[0]
  if len(words) > 1:
    source = words[1]
  if len(words) > 2:
    argument = words[2].strip()
  try:
    return Entry(float(weight), source, argument)
  except ValueError:
    return Entry(math.nan, source, argument)


def task_shares(mixture: Mapping[str, str | float]) -> dict[str, float]:
  """Returns task -> its part of the rows, in the order of task ids; the parts add up to 1."""
  weights = {task: entry_of(task, mixture[task]).weight for task in sorted(mixture)}
  total = sum(weights.values())
  # Twelve digits: 7 : 3 is then 0.7 : 0.3 to the bit, and shares one fingerprint with it.
  return {task: float(f'{weight / total:.12g}') for task, weight in weights.items()}


def problems(mixture: Mapping[str, str | float], sources: Collection[str]) -> Iterator[str]:
  """Yields what is wrong with a mixture, at most one problem for each entry.

  Args:
    mixture: the table.
    sources: names of the sources that there are.
  """
  if not mixture:
    yield (
      f"mixture has no task: source='{SOURCE}' needs some, as mixture.code='0.7 stdlib' and "
      "mixture.bible='0.3 kjv'"
    )
  first_tasks: dict[tuple[str, str], str] = {}
  for task in sorted(mixture):
    entry = entry_of(task, mixture[task])
    first_task = first_tasks.setdefault((entry.source, entry.argument), task)
    problem = _problem(task, entry, sources)
    if not problem and first_task != task:
      problem = f'mixture.{first_task} is the same text; leave one of them out'
    if problem:
      yield f'mixture.{task}={mixture[task]!r}: {problem}'


def _problem(task: str, entry: Entry, sources: Collection[str]) -> str:
  """Returns what is wrong with one entry by itself, '' if nothing is."""
  if not re.fullmatch(r'[\w-]+', task):
    return f'a task has a name of letters, digits, _ and -, and {task!r} is none; give another'
  if math.isnan(entry.weight):
    return f"give 'WEIGHT SOURCE', {EXAMPLE}"
  if not 0 < entry.weight < math.inf:
    weight = f'the weight {entry.weight:g}'
    return f'{weight} is to be a number above 0; leave the task out to have none of it'
  if entry.source not in sources:
    return f"{entry.source!r} is not one of {sorted(sources)}; give 'WEIGHT SOURCE', {EXAMPLE}"
  if entry.source in PATH_SOURCES and not entry.argument:
    return f"source {entry.source!r} needs globs, as '1 text ~/notes/**/*.md'"
  if entry.source == 'synthetic' and not re.fullmatch('[0-9]*', entry.argument):
    return f"{entry.argument!r} is no seed; give a whole number, as '1 synthetic 7'"
  if entry.source not in (*PATH_SOURCES, 'synthetic') and entry.argument:
    return f'source {entry.source!r} takes nothing after its name; drop {entry.argument!r}'
  return ''
