"""How many bytes a compiled program moves through its device's memory, read from its text.

Each instruction outside a fusion reads its operands and writes its result; of an operand that is only sliced or
gathered from, what is taken counts, of an array that is updated in place, the update. On-chip memory does not count.
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
ON_CHIP = re.compile(
  r'\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)\}'
)  # XLA's memory space 0 is the large one

Computations = dict[str, list[Instruction]]


def traffic(text: str) -> float:
  """Bytes read and written in one run. Loops whose length depends on data count as one turn."""
  computations, entry = parse_program(text)
  return sum(
    times * touched(instruction, {i.name: i for i in computations[name]}, computations)
    for name, instruction, times in steps(computations, entry, 1)
  )


def steps(
  computations: Computations, name: str, times: int
) -> Iterator[tuple[str, Instruction, int]]:
  """(computation, instruction, how often it runs) of all that is not inside a fusion."""
  for instruction in computations[name]:
    if instruction.op in RUNS:
      turns = trip_count(instruction, computations) if instruction.op == 'while' else 1
      for called in calls(instruction):
        yield from steps(computations, called, times * turns)
    else:
      yield name, instruction, times


def touched(
  instruction: Instruction, near: dict[str, Instruction], computations: Computations
) -> float:
  """Bytes that one instruction reads and writes. `near`: those of its computation."""
  op = instruction.op
  if op in FREE or op.endswith(('-done', '-update')):
    return 0.0
  if op in TAKES:
    return 2 * in_memory(instruction.shape)
  if op in UPDATES:
    return 2 * in_memory(near[operands(instruction)[UPDATES[op]]].shape)
  if op.endswith('-start') and op != 'fusion-start':  # its result holds its operands, too
    return in_memory(instruction.shape)
  if op in ('fusion', 'fusion-start'):
    return fused(computations[calls(instruction)[0]], instruction, near)
  return in_memory(instruction.shape) + sum(
    in_memory(near[name].shape) for name in operands(instruction)
  )


def fused(inside: list[Instruction], fusion: Instruction, near: dict[str, Instruction]) -> float:
  """Bytes that a fusion reads and writes."""
  byname = {i.name: i for i in inside}
  read = 0.0
  for parameter in (i for i in inside if i.op == 'parameter'):
    outside = near[operands(fusion)[int(parameter.rest.partition(')')[0])]]
    users = [i for i in inside if parameter.name in operands(i)]
    if in_memory(outside.shape):
      taken = all(i.op in TAKES and operands(i)[0] == parameter.name for i in users)
      read += (
        sum(sum(array_bytes(i.shape)) for i in users)
        if taken
        else 0.0
        if all(updates(i, parameter.name) for i in users)
        else in_memory(outside.shape)
      )
  root = inside[-1]
  parts = [byname[name] for name in operands(root)] if root.op == 'tuple' else [root]
  if fusion.op == 'fusion' and not any(part.op in UPDATES for part in parts):
    return read + in_memory(fusion.shape)
  return read + sum(
    sum(
      array_bytes(
        byname[operands(part)[UPDATES[part.op]]].shape if part.op in UPDATES else part.shape
      )
    )
    for part in parts
  )


def updates(instruction: Instruction, name: str) -> bool:
  """Whether it writes a part of `name`, in place."""
  return instruction.op in UPDATES and operands(instruction)[0] == name


def operands(instruction: Instruction) -> list[str]:
  """Names, in their order."""
  return re.findall(r'%([\w.\-]+)', CALLED.split(instruction.rest)[0].partition('), ')[0])


def in_memory(shape: str) -> float:
  """Bytes of the arrays of a shape that lie in the large memory."""
  return sum(array_bytes(ON_CHIP.sub('', shape)))
