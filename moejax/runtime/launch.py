"""How the processes of a run find each other: by flags, or by what the environment says, as JAX reads it."""

import os
import re
import sys
from typing import NamedTuple

import jax
from absl import flags

from moejax.config import ConfigError, check

# What launchers say of how many processes they started. One alone, such as a Slurm shell, connects to nobody.
COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
PATIENCE = 300  # seconds for all processes to come
WHO = '--coordinator=HOST:PORT --num_processes=N --process_id=I'


class Launch(NamedTuple):
  """How the processes of a run find each other; coordinator '': as the environment says, which may be alone."""

  coordinator: str = ''
  num_processes: int = 1
  process_id: int = 0
  heartbeat: int = 60  # seconds without a sign of life after which a process counts as dead


def read_launch_flags(argv: list[str]) -> tuple[Launch, list[str]]:
  """What the flags --coordinator, --num_processes, --process_id and --heartbeat say; and all other arguments.

  Raises:
    ConfigError: some of the first three are missing, or one makes no sense.
  """
  values = flags.FlagValues()
  for name in Launch._fields:
    flags.DEFINE_string(name, '', '', flag_values=values)
  try:
    rest = values(['', *argv], known_only=True)[1:]
  except flags.Error as error:  # only the last one can lack its value
    raise ConfigError(f'{argv[-1]}: {error}') from error
  given = {name: values[name].value for name in Launch._fields if values[name].value}
  missing = [f'--{name}' for name in Launch._fields[:3] if name not in given]
  bad = [
    f'--{name}={text}: use a whole number'
    for name, text in given.items()
    if name != 'coordinator' and not text.isdecimal()
  ]
  check(
    f'{" and ".join(missing)} missing: give all of {WHO}, or none of them'
    if 0 < len(missing) < 3
    else '',
    *bad,
  )
  launch = Launch(
    **{name: text if name == 'coordinator' else int(text) for name, text in given.items()}
  )
  check(
    f'--coordinator={launch.coordinator}: use HOST:PORT of process 0'
    if launch.coordinator and not re.fullmatch(r'.+:\d{1,5}', launch.coordinator)
    else '',
    f'--num_processes={launch.num_processes}: use 1 or more' if launch.num_processes < 1 else '',
    f'--process_id={launch.process_id}: use 0 to --num_processes - 1 = {launch.num_processes - 1}'
    if launch.process_id >= max(1, launch.num_processes)
    else '',
    f'--heartbeat={launch.heartbeat}: use 5 seconds or more' if launch.heartbeat < 5 else '',
  )
  return launch, rest


def connect(launch: Launch) -> None:
  """Joins the other processes, if the flags or the environment speak of any. To be called before JAX has devices.

  Raises:
    ConfigError: the environment speaks of several, and JAX cannot tell how to reach them.
  """
  if not launch.coordinator and not expected():
    return
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
  of = (
    {
      'coordinator_address': launch.coordinator,
      'num_processes': launch.num_processes,
      'process_id': launch.process_id,
      'cluster_detection_method': 'deactivate',
    }
    if launch.coordinator
    else {}
  )
  if launch.coordinator and not launch.process_id:
    print(
      f'waiting at {launch.coordinator} for {launch.num_processes - 1} other processes, {PATIENCE} s at most',
      file=sys.stderr,
    )
  try:
    jax.distributed.initialize(
      **of,
      initialization_timeout=PATIENCE,
      heartbeat_timeout_seconds=launch.heartbeat,
      shutdown_timeout_seconds=launch.heartbeat,
    )
  except (ValueError, RuntimeError, OSError) as error:
    check(
      f'cannot join the other processes: {error}; give each one {WHO}'
      if launch.coordinator or counted()
      else ''
    )
    print(
      f'JAX knows of no other processes ({error}): alone', file=sys.stderr
    )  # as on a TPU of one host


def counted() -> bool:
  """Whether a launcher says that it started several processes."""
  return any(int(os.environ[name]) > 1 for name in COUNTS if name in os.environ)


def expected() -> bool:
  """Whether there may be others: a launcher says so, or JAX has to ask, on a TPU and in a job of Kubernetes. JAX sets
  its platforms to TPU by itself where it finds one."""
  return (
    counted()
    or 'tpu' in (jax.config.jax_platforms or '').split(',')
    or {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= {*os.environ}
  )
