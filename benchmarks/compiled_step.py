"""What does a training step hold that is compiled for chips which need not be here?

  python -m benchmarks.compiled_step --topology=h200:1
  python -m benchmarks.compiled_step --topology=h200:8 --fsdp=8
  python -m benchmarks.compiled_step --topology=v5p:2x2x2 --fsdp=8 --remat=none,experts,full

OLMoE's layers (2048 wide, 64 experts, eight a token), four of its sixteen, in bfloat16; four rows
of 4096 tokens on each device. Of one device: the operations that are run one after the other, the
loops whose length only the data tell, bytes through memory, temporaries, and the collectives that
nothing else can run beside. Several names in --remat are compiled one after the other, a column
each. What is computed again for the backward pass is the plan's count, of products alone.
"""

import argparse
import dataclasses
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moejax.plan.topology import Topology, parse_topology, set_environment


def arguments() -> argparse.Namespace:
  """What the command line says."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', default='h200:1', help='as for moejax plan')
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--expert', type=int, default=1)
  parser.add_argument('--remat', default='full', help='rows of model.remat, or all of them: all')
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--hlo', help='a file for the text of the program, .POLICY added')
  parser.add_argument(
    '--quick', action='store_true', help='the smallest size, for virtual devices of the CPU'
  )
  args = parser.parse_args()
  if args.quick:
    args.topology, args.fsdp, args.layers = 'cpu:2', 2, 1
  return args


def contents(text: str) -> dict[str, str]:
  """What is in a compiled program, and how much memory it moves."""
  from moejax.model.cudnn_attention import SELDOM
  from moejax.plan.hlo.collectives import COLLECTIVE_KINDS
  from moejax.plan.hlo.memory_traffic import FREE, executed, traffic
  from moejax.plan.hlo.program import TRIPS, parse_program

  program = parse_program(text)
  counts: Counter[str] = Counter()
  for _, instruction, times in executed(program.computations, program.entry, 1):
    if instruction.op not in FREE and not instruction.op.endswith('-done'):
      counts[instruction.op] += times
  loops = [line for line in text.splitlines() if ' while(' in line]
  unknown = [line for line in loops if TRIPS.search(line) is None]
  seldom = sum(SELDOM in line for line in unknown)
  synchronous = sum(counts[op] for op in COLLECTIVE_KINDS)
  asynchronous = sum(counts[f'{op}-start'] for op in COLLECTIVE_KINDS)
  return {
    'operations run': str(counts.total()),
    'custom calls, kernels of our own among them': str(counts['custom-call']),
    'copies': str(counts['copy'] + counts['copy-start']),
    'loops of unknown length': str(len(unknown) - seldom),
    'loops for many documents, not counted': str(seldom),
    'collectives': str(synchronous + asynchronous),
    'of them synchronous': str(synchronous),
    'GB through memory': f'{traffic(text) / 1e9:.4g}',
  }


def measured(args: argparse.Namespace, topology: Topology, remat: str) -> dict[str, str]:
  """Compiles the step with one remat policy, and returns what it holds."""
  import jax

  from moejax.families.olmoe import FULL, TINY
  from moejax.model.cross_entropy import LossConfig
  from moejax.plan.roofline import step_flops
  from moejax.sharding.mesh import MeshConfig
  from moejax.train.experiment.config import ExperimentConfig
  from moejax.train.experiment.cost import count_parameters
  from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
  from moejax.train.step.train_step import compile_step

  model = dataclasses.replace(
    TINY if args.quick else FULL, num_layers=args.layers, dtype='bfloat16', remat=remat
  )
  cfg = ExperimentConfig(
    batch_size=4 * topology.count,
    seq_len=64 if args.quick else 4096,
    model=model,
    mesh=MeshConfig(data=0, fsdp=args.fsdp, expert=args.expert),
    loss=LossConfig(chunks=4),
  )
  mesh = make_run_mesh(cfg, topology.devices())
  started = time.monotonic()
  with jax.set_mesh(mesh):
    state = sharded_state_shapes(cfg, mesh)
    compiled = compile_step(cfg, state, batch_shapes(cfg, mesh))
  seconds, text = time.monotonic() - started, compiled.as_text()
  if args.hlo:
    Path(f'{args.hlo}.{remat}').write_text(text)
  memory = compiled.memory_analysis()
  flops = step_flops(cfg, count_parameters(state.model, cfg), topology)
  again = (flops.recomputing - flops.model) / topology.count
  return contents(text) | {
    'TFLOP computed again': f'{again / 1e12:.4g}',
    'of those of the model': f'{flops.recomputing / flops.model - 1:.0%}',
    'GiB of temporaries': f'{memory.temp_size_in_bytes / 2**30:.3g}',
    'GiB of arguments': f'{memory.argument_size_in_bytes / 2**30:.3g}',
    'seconds to compile': f'{seconds:.1f}',
  }


def main() -> None:
  """Compiles the step with each remat policy, and prints what it holds."""
  args = arguments()
  topology = parse_topology(args.topology)
  set_environment(topology)  # before JAX is imported
  from moejax.model.remat import REMAT_POLICIES

  policies = list(REMAT_POLICIES) if args.remat == 'all' else args.remat.split(',')
  columns = {remat: measured(args, topology, remat) for remat in policies}
  table = Table('of one device', *(f'remat {remat}' for remat in columns), title=topology.text)
  for name in columns[policies[0]]:
    table.add_row(name, *(column[name] for column in columns.values()))
  console = Console(width=100 if len(columns) == 1 else 140)
  if topology.note:
    console.print(topology.note)
  console.print(table)


if __name__ == '__main__':
  main()
