"""One run on two processes of four devices each, over loopback, as tests start and wait for
them."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.support.trainer_process import environment, train_command, xla_flags

HEARTBEAT = 10  # seconds
MESH = {'mesh__fsdp': 2, 'mesh__expert': 2}
CHANGES = {
  'steps': 8,
  'log_every': 1,
  'checkpoint__every': 2,
  'checkpoint__keep_every': 4,
  'eval__every': 0,  # one validation, at the end
  'data__synthetic_tokens': 80_000,  # enough documents held out for an interval
  'model__num_layers': 1,
  'model__num_dense_layers': 0,
  **MESH,
}
Launch = tuple[
  list[str], dict[str, str]
]  # flags and environment by which a process finds the other


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as taken:
    taken.bind(('localhost', 0))
    return taken.getsockname()[1]


def by_flags(port: int, i: int) -> Launch:
  """Process i is told everything by flags."""
  return [f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}'], {}


def by_slurm(port: int, i: int) -> Launch:
  """What srun leaves in the environment of task i, and no flag."""
  return [], {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(i),
    'SLURM_LOCALID': str(i),
    'SLURM_STEP_NUM_TASKS': '2',
    'JAX_COORDINATOR_PORT': str(port),
  }


class Two:
  """Two processes of four devices each, which train in `workdir` unless `command` is another.

  `faults` is MOEJAX_FAULT of each; `more` are further flags of each.
  """

  def __init__(
    self,
    workdir: Path,
    faults: Sequence[str] = ('', ''),
    more: Sequence[Sequence[str]] = ((), ()),
    launch: Callable[[int, int], Launch] = by_flags,
    command: Sequence[str] = (),
  ) -> None:
    port, self.processes = free_port(), []
    # Into files: a process whose pipe nobody reads would stop when it is full.
    self.logs = [workdir.parent / f'{workdir.name}.{i}.log' for i in range(2)]
    for i, log in enumerate(self.logs):
      flags, variables = launch(port, i)
      words = command or train_command(workdir, **CHANGES)
      words = [*words, f'--heartbeat={HEARTBEAT}', *flags, *more[i]]
      variables |= {'XLA_FLAGS': xla_flags(devices=4), 'MOEJAX_FAULT': faults[i]}
      with open(log, 'w') as file:
        self.processes.append(
          subprocess.Popen(
            words, env=environment(**variables), stdout=file, stderr=subprocess.STDOUT
          )
        )

  def wait(self) -> tuple[list[int], list[float]]:
    """Exit statuses, and when each ended, in seconds."""
    ends = [0.0, 0.0]
    for _ in range(6000):
      for i, process in enumerate(self.processes):
        if process.poll() is not None and not ends[i]:
          ends[i] = time.monotonic()
      if all(ends):
        return [process.returncode for process in self.processes], ends
      time.sleep(0.05)
    raise TimeoutError(self.output())

  def output(self) -> str:
    """All that both have said."""
    return '\n\n'.join(log.read_text(errors='replace') for log in self.logs)


@contextlib.contextmanager
def two(*args: object, **kwargs: object) -> Iterator[Two]:
  """Two processes, neither of which is left behind, whatever happens."""
  both = Two(*args, **kwargs)
  try:
    yield both
  finally:
    for process in both.processes:
      process.kill()
      process.wait()
