"""The text of a compiled XLA program, parsed: computations, their instructions, shapes and trip counts."""

import math
import re
from typing import NamedTuple

WIDTHS = {
  'pred': 8,
  'bf16': 16,
  'token': 0,
  'opaque': 0,
}  # bits; of any other type the first number in its name

HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?->.*\{$')
INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)='
  r'(\{[^}]*\}|%?[\w.\-]+)'
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BOUND = re.compile(r'= [su]\d+\[\]\S* constant\((\d+)\)')


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str
  op: str
  rest: str  # operands and attributes


def parse_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
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


def calls(instruction: Instruction) -> list[str]:
  """The computations that it runs."""
  return [
    name.strip().lstrip('%')
    for names in CALLED.findall(instruction.rest)
    for name in names.strip('{}').split(',')
  ]


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """How often a loop turns: as the compiler noted it, or the one constant that its condition compares with; else 1."""
  if known := TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
  lines = [f'= {i.shape} {i.op}({i.rest}' for i in computations[condition]]
  bounds = [int(found[1]) for line in lines if (found := BOUND.search(line))]
  return bounds[0] if len(bounds) == 1 else 1


def array_bytes(shape: str) -> list[float]:
  """Of each array in the text of a shape."""
  return [
    math.prod(int(n) for n in sizes.split(',') if n) * width(kind) / 8
    for kind, sizes in ARRAY.findall(shape)
  ]


def width(kind: str) -> int:
  """Bits of a number: 'f8e4m3fn' 8, 's4' 4."""
  found = re.search(r'\d+', kind)
  return WIDTHS[kind] if kind in WIDTHS else int(found[0]) if found else 0
