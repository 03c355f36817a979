"""One run on two processes of four devices each, over loopback: the same as on one, whatever becomes of either."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.lock import hold_run_directory
from moejax.config import ConfigError
from moejax.data.pipeline import open_data
from moejax.runtime import launch
from moejax.train.trainer import train
from tests.support.quick import QUICK
from tests.support.tiny_run import ROOT, config, flags, rows

HEARTBEAT = 10
MESH = {'mesh__fsdp': 2, 'mesh__expert': 2}
CHANGES = {
  'steps': 8,
  'log_every': 1,
  'checkpoint__every': 2,
  'checkpoint__keep_every': 4,
  'eval__every': 0,
  'model__num_layers': 1,
  'model__num_dense_layers': 0,
  **MESH,
}  # one validation, at the end


def free_port() -> int:
  with socket.socket() as taken:
    taken.bind(('localhost', 0))
    return taken.getsockname()[1]


def by_flags(port: int, i: int) -> tuple[list[str], dict[str, str]]:
  return [f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}'], {}


def by_slurm(port: int, i: int) -> tuple[list[str], dict[str, str]]:
  """What srun leaves in the environment of each task, and no flag."""
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
  """Two processes of four devices each. `faults` is MOEJAX_FAULT of each; `more` are further flags of each."""

  def __init__(
    self,
    workdir: Path,
    faults: Sequence[str] = ('', ''),
    more: Sequence[Sequence[str]] = ((), ()),
    found: object = by_flags,
  ) -> None:
    compiler = ' '.join(
      f'--{name}={value}'.replace('False', 'false') for name, value in QUICK.items()
    )
    port, self.processes = free_port(), []
    self.logs = [workdir.parent / f'{workdir.name}.{i}.log' for i in range(2)]
    for i, log in enumerate(self.logs):
      args, environment = found(port, i)
      environment |= {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count=4 {compiler}',
        'PYTHONPATH': str(ROOT),
        'MOEJAX_FAULT': faults[i],
      }
      with open(log, 'w') as file:
        self.processes.append(
          subprocess.Popen(
            [*flags(workdir, **CHANGES), f'--heartbeat={HEARTBEAT}', *args, *more[i]],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
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
    raise TimeoutError(self.said())

  def said(self) -> str:
    return '\n\n'.join(log.read_text(errors='replace') for log in self.logs)


@contextlib.contextmanager
def two(*args: object, **kwargs: object) -> Iterator[Two]:
  """Whatever happens, neither of them is left behind."""
  both = Two(*args, **kwargs)
  try:
    yield both
  finally:
    for process in both.processes:
      process.kill()
      process.wait()


def meta(workdir: Path, step: int) -> dict[str, object]:
  return json.loads((workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())['meta']


def cut_after(workdir: Path, step: int, to: Path) -> Path:
  """A copy of a run directory in which nothing was saved after that step."""
  shutil.copytree(workdir, to)
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to


def assert_close(found: list[dict[str, object]], wanted: list[dict[str, object]]) -> None:
  """The same lines with the same names; losses and loads to the order of sums."""
  assert [(row['step'], sorted(row)) for row in found] == [
    (row['step'], sorted(row)) for row in wanted
  ]
  for one, other in zip(found, wanted):
    for name in (
      'loss',
      'lm_loss',
      'balance/sequence',
      'grad_norm',
      'max_vio',
      'eval/lm_loss',
      'eval/max_vio',
    ):
      if name in one:
        np.testing.assert_allclose(
          one[name], other[name], rtol=1e-5, err_msg=f'{name} of step {one["step"]}'
        )


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Two processes, undisturbed."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  with two(workdir) as both:
    statuses, _ = both.wait()
    assert statuses == [0, 0], both.said()
    said = both.logs[1].read_text()
    assert 'step' not in said and 'digest' not in said, said  # only the first process speaks
  return workdir


@pytest.fixture(scope='module')
def alone(whole: Path) -> Path:
  """The same run in one process of eight devices."""
  workdir = whole.parent / 'alone'
  assert train(config(workdir, **CHANGES)) == 0
  return workdir


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(whole: Path, alone: Path) -> None:
  assert_close(rows(whole), rows(alone))
  names = [
    sorted(
      str(path.relative_to(run))
      for path in run.rglob('*')
      if 'checkpoints/' not in str(path) and 'tensorboard/' not in str(path)
    )
    for run in (whole, alone)
  ]
  assert names[0] == names[1]
  steps = [sorted(path.name for path in (run / 'checkpoints').iterdir()) for run in (whole, alone)]
  assert steps[0] == steps[1] == ['4', '6', '8']
  assert meta(whole, 4)['fingerprint'] == meta(alone, 4)['fingerprint']
  assert (whole / 'config.json').read_text() == (alone / 'config.json').read_text().replace(
    'alone', 'run'
  )
  assert (
    json.loads((whole / 'summary.json').read_text())['mesh']
    == json.loads((alone / 'summary.json').read_text())['mesh']
  )


@pytest.mark.slow
def test_a_run_of_two_goes_on_in_one(whole: Path, alone: Path) -> None:
  workdir = cut_after(whole, 4, whole.parent / 'gathered')
  assert train(config(workdir, **CHANGES)) == 0  # which verifies the digests of what it read
  assert_close(rows(workdir), rows(alone))
  assert rows(workdir)[:4] == rows(whole)[:4]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(alone: Path) -> None:
  """Also: a run of one process goes on in two, which Slurm started."""
  workdir = cut_after(alone, 4, alone.parent / 'stopped')
  with two(workdir, faults=('', 'term@step:5'), found=by_slurm) as both:
    statuses, _ = both.wait()
    said = both.said()
  assert statuses == [128 + signal.SIGTERM] * 2, said
  assert 'resuming after step 4 ' in said
  stopped = int(said.split(' after step ')[-1].split()[0])
  assert 5 <= stopped <= 7 and sorted(os.listdir(workdir / 'checkpoints'))[-1] == str(stopped)
  last = [row for row in rows(workdir) if 'loss' in row]
  assert last[-1]['step'] == stopped
  assert_close(last, [row for row in rows(alone) if 'loss' in row][:stopped])


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_the_same_command_goes_on(whole: Path) -> None:
  """First the second process is killed, then the first is told twice to stop; at last nobody is in the way."""
  workdir = whole.parent / 'killed'
  with two(workdir, faults=('', 'kill@step:5')) as both:
    statuses, ends = both.wait()
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0, both.said()
    assert ends[0] - ends[1] < HEARTBEAT + 5
  with two(workdir, faults=('term@step:5,term@step:6', '')) as both:
    statuses, ends = both.wait()
    assert statuses[0] == 128 + signal.SIGTERM and statuses[1] != 0, both.said()
    assert 'resuming after step ' in both.said() and abs(ends[1] - ends[0]) < HEARTBEAT + 5, (
      both.said()
    )
  assert '6' not in os.listdir(
    workdir / 'checkpoints'
  )  # the second signal does not wait for a save
  with two(workdir, more=[['--config.stop_after=6']] * 2) as both:
    statuses, _ = both.wait()
    assert statuses == [0, 0] and 'resuming after step ' in both.said(), both.said()
  assert rows(workdir) == rows(whole)[:6]
  assert meta(workdir, 6)['digests'] == meta(whole, 6)['digests']


@pytest.mark.slow
def test_what_one_is_refused_all_are_refused(tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  with hold_run_directory(workdir), two(workdir) as both:
    statuses, _ = both.wait()
    assert statuses == [5, 5] and f'in use by process {os.getpid()}' in both.said(), both.said()
  with two(workdir, more=((), ['--config.seed=1'])) as both:
    statuses, _ = both.wait()
    assert (
      statuses == [2, 2] and 'the config of process 1 is not that of process 0' in both.said()
    ), both.said()


def test_a_batch_is_read_in_rows(tmp_path: Path) -> None:
  """The parts that processes read are the batch, bit for bit; so are those of the held-out text, padding included."""
  cfg = config(tmp_path / 'run')
  data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=cfg.seed)
  parts = (0, 1, 6, 7), (2, 3, 4, 5)
  held = [list(data.validation(0, part)) for part in ((), *parts)]
  assert len(held[0]) == len(held[1]) > 1 and not held[0][-1].mask[-1].any()
  for whole, *cut in [
    *zip(*held),
    *((data.batch(i), *(data.batch(i, part) for part in parts)) for i in (0, 1, 77)),
  ]:
    for field, *pieces in zip(whole, *cut):
      for part, piece in zip(parts, pieces):
        np.testing.assert_array_equal(field[list(part)], piece)
        assert field.dtype == piece.dtype


BAD = {
  '--num_processes and --process_id missing': ['--coordinator=a:1'],
  '--coordinator missing: give all of --coordinator=HOST:PORT': [
    '--num_processes=2',
    '--process_id=0',
  ],
  '--process_id=x: use a whole number': [
    '--coordinator=a:1',
    '--num_processes=2',
    '--process_id=x',
  ],
  '--coordinator=a: use HOST:PORT': ['--coordinator=a', '--num_processes=2', '--process_id=0'],
  '--process_id=2: use 0 to --num_processes - 1 = 1': [
    '--coordinator=a:1',
    '--num_processes=2',
    '--process_id=2',
  ],
  '--num_processes=0: use 1 or more': ['--coordinator=a:1', '--num_processes=0', '--process_id=0'],
  '--heartbeat=1: use 5 seconds or more': ['--heartbeat=1'],
  '--process_id: ': ['--process_id'],
}


@pytest.mark.parametrize('told', BAD)
def test_flags_that_make_no_sense_are_refused(told: str) -> None:
  with pytest.raises(ConfigError) as error:
    launch.read_launch_flags(BAD[told])
  assert told in str(error.value)


def test_flags_are_taken_out_of_the_rest() -> None:
  found = launch.read_launch_flags(
    ['--config.steps=1', '--coordinator=a:1', '--num_processes', '2', '--process_id=1', 'x']
  )
  assert found == (launch.Launch('a:1', 2, 1), ['--config.steps=1', 'x'])
  assert launch.read_launch_flags([]) == (launch.Launch(), [])


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, False),
    (
      {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'},
      False,
    ),  # a shell in an allocation, or a script without srun
    ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '1'}, False),
    ({'SLURM_JOB_ID': '1', 'SLURM_STEP_NUM_TASKS': '2'}, True),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ({'KUBERNETES_SERVICE_HOST': 'a'}, False),
    ({'KUBERNETES_SERVICE_HOST': 'a', 'JOB_COMPLETION_INDEX': '0'}, True),
  ],
)
def test_the_environment_says_whether_to_look_for_others(
  monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
  for name in [
    name for name in os.environ if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'JOB_'))
  ]:
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert launch.expected() == expected
  if not expected:
    launch.connect(launch.Launch())
    assert not jax.distributed.is_initialized()


def test_on_a_tpu_others_are_looked_for_and_need_not_be_there(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  def none(**how: object) -> None:
    assert how['heartbeat_timeout_seconds'] == 60 and 'coordinator_address' not in how
    raise ValueError('coordinator_address should be defined.')  # as JAX says it

  monkeypatch.setattr(jax.distributed, 'initialize', none)
  monkeypatch.delenv('SLURM_STEP_NUM_TASKS', raising=False)
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'tpu,cpu')  # what JAX does to itself on a TPU machine
  try:
    launch.connect(launch.Launch())
    assert 'alone' in capsys.readouterr().err
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
    with pytest.raises(
      ConfigError, match='cannot join the other processes.*--coordinator=HOST:PORT'
    ):
      launch.connect(launch.Launch())
  finally:
    jax.config.update('jax_platforms', before)
    jax.config.update('jax_enable_preemption_service', True)
