"""What do many processes cost? Tokens a second of one global batch, in one process and in two.

  python -m benchmarks.processes [--rounds=12 --turn=5 --devices=8 --layers=4 --width=256] [--quick]

Both use the same devices, virtual ones of this machine's CPU; processes talk over loopback by gloo,
as on a cluster without better. All processes are started and compiled first. Then one process and
two processes take turns of a few steps, each with its data and its vote on whether to stop, so that
what slows the machine slows both; ratios are taken turn by turn.
"""

import argparse
import dataclasses
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

import jax
from rich.console import Console
from rich.table import Table

from configs.tiny import get_config
from moejax.config import from_config_dict
from moejax.data.pipeline import open_data
from moejax.data.sources import DataConfig
from moejax.runtime.launch import connect, read_launch_flags
from moejax.runtime.lifecycle import keep_compiled_programs
from moejax.runtime.multiprocess import Vote
from moejax.sharding.mesh import MeshConfig
from moejax.train.compile import compile_programs
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.initial_state import initial_train_state
from moejax.train.shapes import make_run_mesh

ROOT = pathlib.Path(__file__).parents[1]
SCHEDULER = '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
MESHES = {'data': MeshConfig(), 'fsdp': MeshConfig(fsdp=8), 'expert': MeshConfig(expert=8)}
# What `--quick` runs; of fewer than two rounds there is no spread.
SMALLEST = {'rounds': 2, 'turn': 1, 'devices': 2, 'layers': 1, 'width': 32, 'mesh': 'data'}


def experiment(mesh: str, layers: int, width: int) -> ExperimentConfig:
  """configs/tiny.py in short rows of synthetic text, with so many layers of this width."""
  cfg = from_config_dict(ExperimentConfig, get_config())
  return dataclasses.replace(
    cfg,
    batch_size=8,
    seq_len=128,
    mesh=MESHES[mesh],
    data=DataConfig(source='synthetic', tokenizer='bytes'),
    model=dataclasses.replace(cfg.model, num_layers=layers, d_model=width),
  )


def work(cfg: ExperimentConfig) -> None:
  """One process: for each number that comes in, so many steps; tells the seconds."""
  keep_compiled_programs()
  data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=cfg.seed)
  cfg = with_vocabulary(cfg, data.vocab_size)
  mesh = make_run_mesh(cfg)
  with jax.set_mesh(mesh):
    programs, done = compile_programs(cfg, mesh), 0
    state, vote = initial_train_state(cfg, programs.target, mesh), Vote([], mesh)
    for line in sys.stdin:
      begin = time.perf_counter()
      for step in range(done, done + int(line)):
        vote.cast()
        state, _ = programs.train(state, programs.put(data.batch(step, programs.rows)))
      jax.block_until_ready(state)
      done = step + 1
      print(f'seconds {time.perf_counter() - begin}', flush=True)


class Team:
  """Processes that share the devices evenly, and work on demand."""

  def __init__(self, processes: int, mesh: str, args: argparse.Namespace) -> None:
    with socket.socket() as taken:
      taken.bind(('localhost', 0))
      port = taken.getsockname()[1]
    # The user's own flags stay; of a flag that is given twice the last one counts.
    own = f'--xla_force_host_platform_device_count={args.devices // processes} {SCHEDULER}'
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {own}',
    }
    command = [
      sys.executable,
      '-m',
      'benchmarks.processes',
      f'--layers={args.layers}',
      f'--width={args.width}',
      f'--mesh={mesh}',
      '--work',
    ]
    together = [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
    self.processes: list[subprocess.Popen] = []
    for i in range(processes):
      launch = [*together, f'--process_id={i}'] if processes > 1 else []
      self.processes.append(
        subprocess.Popen(
          [*command, *launch],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          text=True,
          env=environment,
        )
      )

  def turn(self, steps: int) -> float:
    """Seconds for so many steps, of the slowest."""
    for process in self.processes:
      print(steps, file=process.stdin, flush=True)
    return max(self.seconds(process) for process in self.processes)

  def seconds(self, process: subprocess.Popen) -> float:
    """The next that a process tells; gloo tells things, too."""
    for line in process.stdout:
      if line.startswith('seconds '):
        return float(line.split()[1])
    raise RuntimeError(f'a process ended with status {process.wait()}')

  def end(self) -> None:
    """All leave together; who does not is killed."""
    for process in self.processes:
      process.stdin.close()
    for process in self.processes:
      try:
        process.wait(timeout=30)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def race(args: argparse.Namespace, mesh: str) -> dict[int, list[float]]:
  """Tokens a second of each turn, in one process and in two."""
  tokens = args.turn * 8 * 128
  teams: dict[int, Team] = {}
  try:
    for count in (1, 2):
      teams[count] = Team(count, mesh, args)
      teams[count].turn(3)  # to warm up
    found: dict[int, list[float]] = {count: [] for count in teams}
    for _ in range(args.rounds):
      for count, team in teams.items():
        found[count].append(tokens / team.turn(args.turn))
    return found
  finally:
    for team in teams.values():
      team.end()


def told(values: list[float], digits: int) -> str:
  """Median, and between what the middle half lies."""
  low, middle, high = statistics.quantiles(values, n=4)
  return f'{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def main(argv: list[str]) -> None:
  """The table."""
  here, argv = read_launch_flags(argv)
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = {'rounds': 12, 'turn': 5, 'devices': 8, 'layers': 4, 'width': 256}
  for name, default in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--mesh', choices=list(MESHES), default='', help='one mesh instead of all')
  parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args(argv)
  if args.quick:
    vars(args).update(SMALLEST)
  if args.work:
    connect(here)
    work(experiment(args.mesh, args.layers, args.width))
    return
  two_title = f'two of {args.devices // 2} devices, tokens/s'
  table = Table('mesh', 'one process, tokens/s', two_title, 'two over one')
  for mesh in [args.mesh] if args.mesh else MESHES:
    one, two = race(args, mesh).values()
    table.add_row(
      f'{mesh}={args.devices}',
      told(one, 0),
      told(two, 0),
      told([b / a for a, b in zip(one, two)], 2),
    )
  Console(width=120).print(table)


if __name__ == '__main__':
  main(sys.argv[1:])
