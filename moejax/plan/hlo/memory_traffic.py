"""How many bytes a compiled program moves through its device's memory, read from its text.

Each instruction outside a fusion reads its operands and writes its result. Of an operand that is
only sliced or gathered from, what is taken counts; of an array that is updated in place, the
update. On-chip memory does not count.
"""

import re
from collections.abc import Iterator

from moejax.plan.hlo.program import (
  CALLED,
  Instruction,
  array_bytes,
  calls,
  parse_program,
  trip_count,
)

# What makes no array, or one that whoever reads it makes anew.
FREE = {
  'parameter',
  'constant',
  'get-tuple-element',
  'tuple',
  'bitcast',
  'after-all',
  'partition-id',
  'iota',
  'opt-barrier',
  'replica-id',
  'broadcast',
}
TAKES = {'dynamic-slice', 'slice', 'gather'}
UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # in place: which operand is written
RUNS = {'while', 'call', 'conditional'}
# XLA's memory space 0 is the large one.
ON_CHIP = re.compile(r'\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)\}')

Computations = dict[str, list[Instruction]]


def traffic(text: str) -> float:
  """Returns the bytes read and written in one run of a program, from its `as_text()`.

  A loop whose length depends on data counts as one turn.
  """
  program = parse_program(text)
  by_name: dict[str, dict[str, Instruction]] = {}
  for name, instructions in program.computations.items():
    by_name[name] = {instruction.name: instruction for instruction in instructions}
  total = 0.0
  for name, instruction, times in executed(program.computations, program.entry, 1):
    total += times * touched_bytes(instruction, by_name[name], program.computations)
  return total


def executed(
  computations: Computations, name: str, times: int
) -> Iterator[tuple[str, Instruction, int]]:
  """Yields (computation, instruction, how often it runs) of all that is not inside a fusion."""
  for instruction in computations[name]:
    if instruction.op in RUNS:
      turns = trip_count(instruction, computations) if instruction.op == 'while' else 1
      for called in calls(instruction):
        yield from executed(computations, called, times * turns)
    else:
      yield name, instruction, times


def touched_bytes(
  instruction: Instruction, near: dict[str, Instruction], computations: Computations
) -> float:
  """Returns the bytes that one instruction reads and writes each time.

  Args:
    instruction: one outside a fusion; or a fusion.
    near: name -> instruction of its computation, in which its operands are.
    computations: of the program, in which the inside of a fusion is.
  """
  op = instruction.op
  if op in FREE or op.endswith(('-done', '-update')):
    return 0.0
  if op in TAKES:
    return 2 * in_memory(instruction.shape)
  if op in UPDATES:
    return 2 * in_memory(near[operands(instruction)[UPDATES[op]]].shape)
  if op in ('fusion', 'fusion-start'):
    inside = computations[calls(instruction)[0]]
    return read_by_fusion(inside, instruction, near) + written_by_fusion(inside, instruction)
  if op.endswith('-start'):  # its result holds its operands, too
    return in_memory(instruction.shape)
  read = sum(in_memory(near[name].shape) for name in operands(instruction))
  return in_memory(instruction.shape) + read


def read_by_fusion(
  inside: list[Instruction], fusion: Instruction, near: dict[str, Instruction]
) -> float:
  """Returns the bytes that a fusion reads of its operands; arguments as in `touched_bytes`."""
  total = 0.0
  for parameter in inside:
    if parameter.op != 'parameter':
      continue
    number = int(parameter.rest.partition(')')[0])
    outside = near[operands(fusion)[number]]
    if not in_memory(outside.shape):
      continue
    total += taken_bytes(inside, parameter.name, in_memory(outside.shape))
  return total


def taken_bytes(inside: list[Instruction], parameter: str, whole: float) -> float:
  """Returns the bytes that a fusion reads of one operand, of which there are `whole`.

  A bitcast is the same array under another name. What is only sliced is read in part, and what is
  updated in place is not read for that; both may be true of one array.
  """
  names = {parameter}
  for instruction in inside:  # operands stand before their users
    if instruction.op == 'bitcast' and operands(instruction)[0] in names:
      names.add(instruction.name)
  readers = [
    user
    for user in inside
    if names & {*operands(user)} and user.name not in names and not updates(user, names)
  ]
  if all(user.op in TAKES and operands(user)[0] in names for user in readers):
    return sum(sum(array_bytes(user.shape)) for user in readers)
  return whole


def written_by_fusion(inside: list[Instruction], fusion: Instruction) -> float:
  """Returns the bytes that a fusion writes; of a result updated in place, only the update."""
  by_name = {instruction.name: instruction for instruction in inside}
  root = inside[-1]
  results = [by_name[name] for name in operands(root)] if root.op == 'tuple' else [root]
  results = [unwrapped(result, by_name) for result in results]
  if fusion.op == 'fusion' and not any(result.op in UPDATES for result in results):
    return in_memory(fusion.shape)
  # The shape of a fusion-start has its operands, too: its results are looked at inside.
  total = 0.0
  for result in results:
    written = result
    if result.op in UPDATES:
      written = by_name[operands(result)[UPDATES[result.op]]]
    total += sum(array_bytes(written.shape))
  return total


def unwrapped(instruction: Instruction, by_name: dict[str, Instruction]) -> Instruction:
  """Returns the instruction that a bitcast, or several, give another name and shape."""
  while instruction.op == 'bitcast':
    instruction = by_name[operands(instruction)[0]]
  return instruction


def updates(instruction: Instruction, names: set[str]) -> bool:
  """Returns whether an instruction writes a part of an array of these names, in place.

  One that also takes its update from the array reads it.
  """
  if instruction.op not in UPDATES:
    return False
  target, *others = operands(instruction)
  return target in names and not names & {*others}


def operands(instruction: Instruction) -> list[str]:
  """Returns the names of an instruction's operands, in their order."""
  before_calls = CALLED.split(instruction.rest)[0]
  return re.findall(r'%([\w.\-]+)', before_calls.partition('), ')[0])


def in_memory(shape: str) -> float:
  """Returns the bytes of those arrays of a shape that lie in the large memory."""
  return sum(array_bytes(ON_CHIP.sub('', shape)))
