"""The text of a compiled XLA program, parsed: its computations, instructions and trip counts."""

import math
import re
from typing import NamedTuple

from moejax.model.cudnn_attention import SELDOM

# Type -> bits of a number, where the first number in the type's name does not say it.
WIDTHS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}

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
  shape: str  # text, as 'bf16[8,4]{1,0}', or several in parentheses
  op: str
  rest: str  # operands and attributes


class Program(NamedTuple):
  """A compiled program: computation -> its instructions, and the name of the one that is run."""

  computations: dict[str, list[Instruction]]
  entry: str


def parse_program(text: str) -> Program:
  """Returns the computations of a program from `compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry = name = ''
  for line in text.splitlines():
    if header := HEADER.match(line):
      name = header[2]
      entry = name if header[1] else entry
      computations[name] = []
    elif name and (instruction := INSTRUCTION.match(line)):
      computations[name].append(Instruction(*instruction.groups()))
  return Program(computations, entry)


def calls(instruction: Instruction) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  called: list[str] = []
  for names in CALLED.findall(instruction.rest):
    called += [name.strip().lstrip('%') for name in names.strip('{}').split(',')]
  return called


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """Returns how often a loop turns; 1 where the program does not tell, 0 where it seldom does.

  It is what the compiler noted, or the one constant that the loop's condition compares with.
  """
  if SELDOM in loop.rest:
    return 0
  if known := TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
  lines = [f'= {i.shape} {i.op}({i.rest}' for i in computations[condition]]
  bounds = [int(bound) for line in lines for bound in BOUND.findall(line)[:1]]
  # Of several constants none is known to be the bound.
  return bounds[0] if len(bounds) == 1 else 1


def array_bytes(shape: str) -> list[float]:
  """Returns the bytes of each array in the text of a shape; a tuple has several."""
  sizes: list[float] = []
  for kind, dimensions in ARRAY.findall(shape):
    numbers = math.prod(int(n) for n in dimensions.split(',') if n)
    sizes.append(numbers * width(kind) / 8)
  return sizes


def width(kind: str) -> int:
  """Returns the bits of a number: 8 of 'f8e4m3fn', 4 of 's4'; 0 of what is no number."""
  if kind in WIDTHS:
    return WIDTHS[kind]
  digits = re.search(r'\d+', kind)
  return int(digits[0]) if digits else 0
