"""What a compiled program says to other devices, read from its text: collectives by kind, mesh axes and bytes.

  text -> computations -> how often each runs (loops by their trip count) -> collectives, added up

Bytes are what one device sends over the links in a ring or a pairwise exchange, for groups of n devices: an all-gather
(n - 1)/n of what it ends with, a reduce-scatter (n - 1)/n of what it starts with, an all-reduce both.
"""

from collections.abc import Callable, Iterator, Mapping
import math
import re
from typing import NamedTuple

from moejax.groups import axes_of, groups_of

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')
WIDTHS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}   # bits; of any other type the first number in its name

HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?->.*\{$')
INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
CALLED = re.compile(r'(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)='
                    r'(\{[^}]*\}|%?[\w.\-]+)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BOUND = re.compile(r'= [su]\d+\[\]\S* constant\((\d+)\)')


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str
  op: str
  rest: str    # operands and attributes


class Collective(NamedTuple):
  """All the collectives of a kind over the same mesh axes, in one run of the program."""

  kind: str
  axes: tuple[str, ...]   # () where groups are no product of mesh axes
  count: int              # times that it runs
  bytes: float            # that a device sends, all times together


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """Most bytes first. `mesh`: axis -> size, in the order in which the devices are numbered."""
  computations, entry = parse(text)
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


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Computation -> its instructions; and which one is the entry."""
  computations: dict[str, list[Instruction]] = {}
  entry = name = ''
  for line in text.splitlines():
    if header := HEADER.match(line):
      name = header[2]
      entry = name if header[1] else entry
      computations[name] = []
    elif name and (found := INSTRUCTION.match(line)):
      computations[name].append(Instruction(*found.groups()))
  return computations, entry


def walk(computations: dict[str, list[Instruction]], entry: str) -> Iterator[tuple[str, Instruction, int]]:
  """(computation, collective, how often it runs): once where it starts, not again where it is done."""
  speaks: dict[str, bool] = {}

  def has_collective(name: str) -> bool:
    if name not in speaks:
      speaks[name] = any(is_collective(i.op) or any(has_collective(c) for c in calls(i)) for i in computations[name])
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


def calls(instruction: Instruction) -> list[str]:
  """The computations that it runs."""
  return [name.strip().lstrip('%') for names in CALLED.findall(instruction.rest)
          for name in names.strip('{}').split(',')]


def is_collective(op: str) -> bool:
  """Whether it sends: `X` or `X-start`."""
  return op.removesuffix('-start') in KINDS


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """How often a loop turns: as the compiler noted it, or the one constant that its condition compares with; else 1."""
  if known := TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
  lines = [f'= {i.shape} {i.op}({i.rest}' for i in computations[condition]]
  bounds = [int(found[1]) for line in lines if (found := BOUND.search(line))]
  return bounds[0] if len(bounds) == 1 else 1


def kind_of(computation: str, instruction: Instruction) -> str:
  """TPUs write a reduce-scatter as a computation of that name, around an all-reduce."""
  kind = instruction.op.removesuffix('-start')
  return 'reduce-scatter' if kind == 'all-reduce' and computation.startswith('all-reduce-scatter') else kind


def array_bytes(shape: str) -> list[float]:
  """Of each array in the text of a shape."""
  return [math.prod(int(n) for n in sizes.split(',') if n) * width(kind) / 8 for kind, sizes in ARRAY.findall(shape)]


def width(kind: str) -> int:
  """Bits of a number: 'f8e4m3fn' 8, 's4' 4."""
  found = re.search(r'\d+', kind)
  return WIDTHS[kind] if kind in WIDTHS else int(found[0]) if found else 0


def sent_bytes(kind: str, instruction: Instruction, size: int, around: list[Instruction]) -> float:
  """What one device sends each time."""
  arrays = array_bytes(instruction.shape)
  part, whole = (size - 1) / size, sum(arrays)
  if kind == 'ragged-all-to-all':   # its result has room for the worst case; its first operand is what is sent
    operand = re.match(r'[^%,)]*%?([\w.\-]+)', instruction.rest)[1]
    return part * sum(sum(array_bytes(i.shape)) for i in around if i.name == operand)
  if instruction.op.endswith('-start'):   # (operands, results, ...)
    whole = {'all-gather': whole * size / (size + 1), 'collective-permute': arrays[0]}.get(kind) or whole
  return SENT[kind](whole, part, size, instruction.op)


# kind -> bytes sent, of (bytes of the result, (n - 1) / n, n, op)
SENT: dict[str, Callable[[float, float, int, str], float]] = {
  'all-gather': lambda whole, part, size, op: part * whole,
  'all-reduce': lambda whole, part, size, op: 2 * part * whole,
  'reduce-scatter': lambda whole, part, size, op: part * whole * (size if op == 'reduce-scatter' else 1),
  'all-to-all': lambda whole, part, size, op: part * whole,
  'collective-permute': lambda whole, part, size, op: whole,
  'collective-broadcast': lambda whole, part, size, op: whole,
}
