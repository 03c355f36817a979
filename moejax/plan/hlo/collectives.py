"""What a compiled program sends to other devices: collectives by kind, mesh axes and bytes.

  text -> computations -> how often each runs (loops by their trip count) -> collectives, added up

Bytes are what one device sends over the links in a ring or a pairwise exchange, for groups of n
devices: an all-gather (n - 1)/n of what it ends with, a reduce-scatter (n - 1)/n of what it starts
with, an all-reduce both.
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
  """Returns the collectives of a program, most bytes first.

  Args:
    text: the compiled program, from `as_text()`.
    mesh: axis -> size, in the order in which the devices are numbered.
  """
  program = parse_program(text)
  counts: dict[tuple[str, tuple[str, ...]], int] = {}
  sent: dict[tuple[str, tuple[str, ...]], float] = {}
  for computation, instruction, times in walk(program.computations, program.entry):
    groups = groups_of(instruction.rest, math.prod(mesh.values()))
    devices = groups.shape[1]
    if devices == 1:  # a group of one sends nothing
      continue
    kind = kind_of(computation, instruction)
    key = kind, axes_of(groups, mesh)
    each = sent_bytes(kind, instruction, devices, program.computations[computation])
    counts[key] = counts.setdefault(key, 0) + times
    sent[key] = sent.setdefault(key, 0.0) + times * each
  found = [Collective(*key, counts[key], size) for key, size in sent.items()]
  return sorted(found, key=lambda collective: -collective.bytes)


def walk(
  computations: dict[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, Instruction, int]]:
  """Yields (computation, collective, how often it runs).

  A collective in two halves, `X-start` and `X-done`, is yielded where it starts.
  """
  has: dict[str, bool] = {}  # computation -> does it, or what it calls, have a collective

  def has_collective(name: str) -> bool:
    if name not in has:
      has[name] = any(is_collective(instruction.op) for instruction in computations[name])
      for instruction in computations[name]:
        has[name] = has[name] or any(map(has_collective, calls(instruction)))
    return has[name]

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
  """Returns whether an instruction sends: `X` or `X-start` of a kind X."""
  return op.removesuffix('-start') in COLLECTIVE_KINDS


def kind_of(computation: str, instruction: Instruction) -> str:
  """Returns a row of COLLECTIVE_KINDS.

  TPUs write a reduce-scatter as a computation of that name, around an all-reduce.
  """
  kind = instruction.op.removesuffix('-start')
  if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
    return 'reduce-scatter'
  return kind


def sent_bytes(
  kind: str, instruction: Instruction, devices: int, around: list[Instruction]
) -> float:
  """Returns the bytes that one device sends each time a collective runs.

  Args:
    kind: a row of COLLECTIVE_KINDS.
    instruction: the collective.
    devices: in each of its groups.
    around: all instructions of its computation.
  """
  share = (devices - 1) / devices
  if kind == 'ragged-all-to-all':
    # Its result has room for the worst case; its first operand is what is sent.
    operand = re.match(r'[^%,)]*%?([\w.\-]+)', instruction.rest)[1]
    shapes = [other.shape for other in around if other.name == operand]
    return share * sum(sum(array_bytes(shape)) for shape in shapes)
  arrays = array_bytes(instruction.shape)
  whole = sum(arrays)
  if instruction.op.endswith('-start') and whole:
    # The shape of a start has the operand, the result and sometimes a context, not the result only.
    if kind == 'all-gather':
      whole = whole * devices / (devices + 1)
    elif kind == 'collective-permute':
      whole = arrays[0] or whole
  return SENT[kind](whole, share, devices, instruction.op)


# kind -> bytes sent, of (bytes of the result, (n - 1) / n, n, op)
SENT: dict[str, Callable[[float, float, int, str], float]] = {
  'all-gather': lambda whole, share, devices, op: share * whole,
  'all-reduce': lambda whole, share, devices, op: 2 * share * whole,
  # What it starts with is n times its result; the TPU's all-reduce in its place has it whole.
  'reduce-scatter': lambda whole, share, devices, op: (
    share * whole * (devices if op == 'reduce-scatter' else 1)
  ),
  'all-to-all': lambda whole, share, devices, op: share * whole,
  'collective-permute': lambda whole, share, devices, op: whole,
  'collective-broadcast': lambda whole, share, devices, op: whole,
}
