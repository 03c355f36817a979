"""How the processes of a run find each other: by flags, or by the environment, as JAX reads it."""

import os
import re
import sys
from typing import NamedTuple

import jax
from absl import flags

from moejax.config import ConfigError, check, problem_if

# Variables in which launchers say how many processes they started. A process alone, such as a shell
# in a Slurm allocation, connects to no other.
COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
CONNECT_SECONDS = 300  # seconds for all processes to connect
USAGE = '--coordinator=HOST:PORT --num_processes=N --process_id=I'


class Launch(NamedTuple):
  """How the processes of a run find each other, as flags say it."""

  coordinator: str = ''  # HOST:PORT of process 0; '': as the environment says, which may be alone
  num_processes: int = 1
  process_id: int = 0
  heartbeat: int = 60  # seconds without a heartbeat after which a process counts as dead


def read_launch_flags(argv: list[str]) -> tuple[Launch, list[str]]:
  """Returns what --coordinator, --num_processes, --process_id and --heartbeat say, and the rest.

  The rest are all other arguments, in order.

  Raises:
    ConfigError: some of the first three are missing, or one makes no sense.
  """
  values = flags.FlagValues()
  for name in Launch._fields:
    flags.DEFINE_string(name, '', '', flag_values=values)
  try:
    rest = values(['', *argv], known_only=True)[1:]
  except flags.Error as error:  # each takes a value, and only the last argument can lack one
    raise ConfigError(f'{argv[-1]}: {error}') from error
  given = {name: values[name].value for name in Launch._fields if values[name].value}
  missing = [f'--{name}' for name in Launch._fields[:3] if name not in given]
  numbers = {name: text for name, text in given.items() if name != 'coordinator'}
  check(
    problem_if(
      0 < len(missing) < 3,
      f'{" and ".join(missing)} missing: give all of {USAGE}, or none of them',
    ),
    *(
      f'--{name}={text}: use a whole number'
      for name, text in numbers.items()
      if not text.isdecimal()
    ),
  )
  coordinator = given['coordinator'] if 'coordinator' in given else ''
  launch = Launch(coordinator, **{name: int(text) for name, text in numbers.items()})
  check(*_launch_problems(launch))
  return launch, rest


def _launch_problems(launch: Launch) -> list[str]:
  """Returns what makes no sense in the values of the flags, '' for each check that is passed."""
  is_address = re.fullmatch(r'.+:\d{1,5}', launch.coordinator)
  last_id = launch.num_processes - 1
  return [
    problem_if(
      launch.coordinator and not is_address,
      f'--coordinator={launch.coordinator}: use HOST:PORT of process 0',
    ),
    problem_if(launch.num_processes < 1, f'--num_processes={launch.num_processes}: use 1 or more'),
    problem_if(
      launch.process_id > max(0, last_id),
      f'--process_id={launch.process_id}: use 0 to --num_processes - 1 = {last_id}',
    ),
    problem_if(launch.heartbeat < 5, f'--heartbeat={launch.heartbeat}: use 5 seconds or more'),
  ]


def connect(launch: Launch) -> None:
  """Connects to the other processes, if the flags or the environment speak of any.

  To be called before anything asks JAX for its devices.

  Raises:
    ConfigError: there are several, and JAX cannot reach them or cannot tell how to.
  """
  if not launch.coordinator and not may_have_other_processes():
    return
  # The service would take SIGTERM for itself, which means to us: save, and leave.
  jax.config.update('jax_enable_preemption_service', False)
  address: dict[str, object] = {}  # empty: JAX finds the others by what the environment says
  if launch.coordinator:
    address = {
      'coordinator_address': launch.coordinator,
      'num_processes': launch.num_processes,
      'process_id': launch.process_id,
      'cluster_detection_method': 'deactivate',
    }
    if launch.process_id == 0:
      print(
        f'waiting at {launch.coordinator} for {launch.num_processes - 1} other processes, '
        f'{CONNECT_SECONDS} s at most',
        file=sys.stderr,
      )
  try:
    jax.distributed.initialize(
      **address,
      initialization_timeout=CONNECT_SECONDS,
      heartbeat_timeout_seconds=launch.heartbeat,
      shutdown_timeout_seconds=launch.heartbeat,
    )
  except (ValueError, RuntimeError, OSError) as error:
    if launch.coordinator or has_launched_several():
      problem = f'cannot join the other processes: {error}; give each one {USAGE}'
      raise ConfigError(problem) from error
    # On a TPU of one host JAX asks for others, and there are none.
    print(f'JAX knows of no other processes ({error}): alone', file=sys.stderr)


def has_launched_several() -> bool:
  """Tells whether a launcher says that it started several processes."""
  return any(int(os.environ[name]) > 1 for name in COUNTS if name in os.environ)


def may_have_other_processes() -> bool:
  """Tells whether there may be other processes.

  Either a launcher says so, or only JAX can tell: on a TPU, and in an indexed job of Kubernetes.
  """
  # JAX sets its platforms to TPU by itself where it finds one.
  on_tpu = 'tpu' in (jax.config.jax_platforms or '').split(',')
  in_kubernetes_job = {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= {*os.environ}
  return has_launched_several() or on_tpu or in_kubernetes_job
