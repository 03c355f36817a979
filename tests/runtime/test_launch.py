"""How a process finds the others: flags, the environment of a cluster, and a TPU that tells of
itself."""

import os

import jax
import pytest

from moejax.config import ConfigError
from moejax.runtime import launch

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
  assert launch.may_have_other_processes() == expected
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
