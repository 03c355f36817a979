"""What a compiled program says to other devices, read from its text: collectives by kind, mesh axes and bytes.

  text -> computations -> how often each runs (loops by their trip count) -> collectives, added up

Bytes are what one device sends over the links in a ring or a pairwise exchange, for groups of n devices: an all-gather
(n - 1)/n of what it ends with, a reduce-scatter (n - 1)/n of what it starts with, an all-reduce both.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from moejax.plan.hlo.program import Instruction, array_bytes, calls, parse_program, trip_count
from moejax.plan.hlo.replica_groups import axes_of, groups_of

COLLECTIVE_KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


class Collective(NamedTuple):
  """All the collectives of a kind over the same mesh axes, in one run of the program."""

  kind: str
  axes: tuple[str, ...]  # () where groups are no product of mesh axes
  count: int  # times that it runs
  bytes: float  # that a device sends, all times together


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """Most bytes first. `mesh`: axis -> size, in the order in which the devices are numbered."""
  computations, entry = parse_program(text)
  found: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
  for name, instruction, times in walk(computations, entry):
    kind = kind_of(name, instruction)
    groups = groups_of(instruction.rest, math.prod(mesh.values()))
    axes, size = axes_of(groups, mesh), groups.shape[1]
    if size > 1:
      count, sent = found.get((kind, axes)) or (0, 0.0)
      each = sent_bytes(kind, instruction, size, computations[name])
      found[kind, axes] = count + times, sent + times * each
  return sorted((Collective(*key, *value) for key, value in found.items()), key=lambda c: -c.bytes)


def walk(
  computations: dict[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, Instruction, int]]:
  """(computation, collective, how often it runs): once where it starts, not again where it is done."""
  speaks: dict[str, bool] = {}

  def has_collective(name: str) -> bool:
    if name not in speaks:
      speaks[name] = any(
        is_collective(i.op) or any(has_collective(c) for c in calls(i)) for i in computations[name]
      )
    return speaks[name]

  def visit(name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
    for instruction in computations[name]:
      if is_collective(instruction.op):
        yield name, instruction, times
      elif not instruction.op.endswith(('-done', '-update')):
        turns = trip_count(instruction, computations) if instruction.op == 'while' else 1
        for called in calls(instruction):
          if has_collective(called):
            yield from visit(called, times * turns)

  return visit(entry, 1)


def is_collective(op: str) -> bool:
  """Whether it sends: `X` or `X-start`."""
  return op.removesuffix('-start') in COLLECTIVE_KINDS


def kind_of(computation: str, instruction: Instruction) -> str:
  """TPUs write a reduce-scatter as a computation of that name, around an all-reduce."""
  kind = instruction.op.removesuffix('-start')
  return (
    'reduce-scatter'
    if kind == 'all-reduce' and computation.startswith('all-reduce-scatter')
    else kind
  )


def sent_bytes(kind: str, instruction: Instruction, size: int, around: list[Instruction]) -> float:
  """What one device sends each time."""
  arrays = array_bytes(instruction.shape)
  part, whole = (size - 1) / size, sum(arrays)
  if (
    kind == 'ragged-all-to-all'
  ):  # its result has room for the worst case; its first operand is what is sent
    operand = re.match(r'[^%,)]*%?([\w.\-]+)', instruction.rest)[1]
    return part * sum(sum(array_bytes(i.shape)) for i in around if i.name == operand)
  if instruction.op.endswith('-start'):  # (operands, results, ...)
    whole = {'all-gather': whole * size / (size + 1), 'collective-permute': arrays[0]}.get(
      kind
    ) or whole
  return SENT[kind](whole, part, size, instruction.op)


# kind -> bytes sent, of (bytes of the result, (n - 1) / n, n, op)
SENT: dict[str, Callable[[float, float, int, str], float]] = {
  'all-gather': lambda whole, part, size, op: part * whole,
  'all-reduce': lambda whole, part, size, op: 2 * part * whole,
  'reduce-scatter': lambda whole, part, size, op: (
    part * whole * (size if op == 'reduce-scatter' else 1)
  ),
  'all-to-all': lambda whole, part, size, op: part * whole,
  'collective-permute': lambda whole, part, size, op: whole,
  'collective-broadcast': lambda whole, part, size, op: whole,
}
