"""`--plan --topology=NAME`: the devices of that name, and how a process begins to compile for them.

argv -> what to plan for (environment set) -> devices: of TPUs by libtpu, of GPUs by a description
of theirs

Ahead-of-time compilation, no accelerator needed. Nothing here may import JAX before the environment
is set.
"""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moejax.config import check, problem_if
from moejax.runtime.chips import CHIPS, Chip

if TYPE_CHECKING:  # nothing here may import jax before the environment is set
  import jax

MODES = ('once', 'fit')
TARGETS = Path(__file__).parent / 'targets'
GPUS = ', '.join(name for name, chip in CHIPS.items() if not chip.torus)
KNOWN = (
  'v5p:8x8x8 (TPU v4, v5p and tpu7x by three sizes, v5e:8x8 and v6e:16x16 by two), h200:256 (GPUs '
  f'by their number: {GPUS}), cpu:512 (virtual devices)'
)
# The plug-in that compiles for TPUs or GPUs -> the extra that installs it.
EXTRAS = {'libtpu': 'tpu', 'jax_cuda13_plugin': 'cuda'}
CPU_NOTE = "sizes and collectives are those of the CPU's compiler"


class Topology(NamedTuple):
  """Devices to plan for; the machine need not have them."""

  text: str  # as it was given, 'v5p:8x8x8'
  chip: Chip | None  # None: only virtual devices of the CPU, which are no chip
  sizes: tuple[int, ...]  # of the torus; of GPUs and virtual devices their number
  compiler: str  # 'tpu', 'gpu' or 'cpu': whose sizes and collectives they are
  note: str  # what to know of that, '' if nothing

  @property
  def count(self) -> int:
    """The number of JAX devices."""
    return math.prod(self.sizes) * (self.chip.per_chip if self.chip else 1)

  def devices(self) -> 'list[jax.Device]':
    """Returns the devices in the order in which a mesh takes them.

    Raises:
      ConfigError: there is no such slice, or this process began without `set_environment`.
    """
    if self.compiler == 'cpu':
      return self._virtual_devices()
    try:
      return self._tpu_devices() if self.compiler == 'tpu' else self._gpu_devices()
    except (RuntimeError, ValueError) as error:
      check(f'--topology={self.text}: {str(error).splitlines()[0]}: use one like {KNOWN}')
      raise

  @property
  def _name(self) -> str:
    """The chip as --topology has it: a row of CHIPS, or 'cpu'."""
    return self.text.partition(':')[0]

  def _virtual_devices(self) -> 'list[jax.Device]':
    import jax

    devices = jax.devices('cpu')
    check(
      problem_if(
        len(devices) < self.count,
        f'--topology={self.text}: this process has {len(devices)} CPU devices: start it with '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={self.count}',
      )
    )
    return devices[: self.count]

  def _tpu_devices(self) -> 'list[jax.Device]':
    from jax.experimental import topologies

    # Of a v4, too, a device is a chip with its two cores.
    cores = {'chip_config_name': 'megacore'} if self._name == 'v4' else {}
    return topologies.get_topology_desc(topology_name=self.text, platform='tpu', **cores).devices

  def _gpu_devices(self) -> 'list[jax.Device]':
    from jax.experimental import topologies

    target = (TARGETS / f'{self._name}.txtpb').read_text()
    nodes = max(1, self.count // self.chip.node)
    ask_described_target(target)
    return topologies.get_topology_desc(
      platform='cuda', topology=f'1x{nodes}x{self.count // nodes}', target_config=target
    ).devices


def ask_described_target(target: str) -> None:
  """Makes JAX ask the description of a GPU what cuDNN's attention can do.

  By itself it asks the GPU of the machine, and without one would refuse heads wider than 128.
  """
  from jax._src.cudnn import fused_attention_stablehlo

  major = int(re.search(r'cuda_compute_capability \{ major: (\d+)', target)[1])
  fused_attention_stablehlo.check_compute_capability = lambda least: major >= float(least)


class PlanFlags(NamedTuple):
  """What a command line says of a plan."""

  mode: str  # 'once' or 'fit'; '' without --plan
  topology: Topology | None  # None without --plan
  rest: list[str]  # the other arguments


def read_plan_flags(argv: list[str]) -> PlanFlags:
  """Returns what to plan for, and sets the environment for it; without --plan it does nothing.

  Raises:
    ConfigError: an unknown topology, or one of the two flags without the other.
  """
  flags: dict[str, str] = {}
  rest: list[str] = []
  for arg in argv:
    flag, _, value = arg.partition('=')
    if flag in ('--plan', '--topology'):
      flags[flag] = value
    else:
      rest.append(arg)
  if not flags:
    return PlanFlags('', None, argv)
  has_topology = '--topology' in flags and bool(flags['--topology'])
  check(
    problem_if('--plan' not in flags, '--topology is for --plan: add --plan, or --plan=fit'),
    problem_if(not has_topology, f'--plan needs --topology=NAME of what to plan for: {KNOWN}'),
  )
  mode = flags['--plan'] or 'once'
  check(
    problem_if(
      mode not in MODES,
      f'--plan={mode}: use --plan, for the mesh of the config, or --plan=fit, to look for one',
    )
  )
  topology = parse_topology(flags['--topology'])
  set_environment(topology)
  return PlanFlags(mode, topology, rest)


def parse_topology(text: str) -> Topology:
  """Returns the devices of a name: 'v5p:8x8x8', 'h200:256', 'cpu:512'.

  Raises:
    ConfigError: no such chip, or sizes that it does not come in.
  """
  name, _, size = text.partition(':')
  is_known = name in (*CHIPS, 'cpu') and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size)
  check(problem_if(not is_known, f'--topology={text} is not known: use one like {KNOWN}'))
  sizes = tuple(int(n) for n in size.split('x'))
  chip = CHIPS[name] if name in CHIPS else None
  axes = max(1, chip.torus) if chip else 1  # GPUs and virtual devices come by their number
  check(
    problem_if(
      len(sizes) != axes,
      f'--topology={text}: {name} is by {axes} sizes, not {len(sizes)}: use one like {KNOWN}',
    ),
    whole_nodes_problem(text, chip, sizes[0]) if chip else '',
  )
  if not chip:
    return Topology(text, None, sizes, 'cpu', CPU_NOTE)
  if missing := missing_compiler(name, chip):
    return Topology(text, chip, sizes, 'cpu', f'{missing} {CPU_NOTE}')
  return Topology(text, chip, sizes, 'tpu' if chip.torus else 'gpu', '')


def whole_nodes_problem(text: str, chip: Chip, count: int) -> str:
  """Returns what is wrong with GPUs that fill a node and only a part of another; '' if nothing."""
  node = chip.node
  return problem_if(
    node and count > node and count % node,
    f'--topology={text}: use 1 to {node} GPUs or a multiple of {node}, which are a node',
  )


def missing_compiler(name: str, chip: Chip) -> str:
  """Returns what is missing to compile for a chip, as the beginning of a note; '' if nothing."""
  plugin = 'libtpu' if chip.torus else 'jax_cuda13_plugin'
  if not importlib.util.find_spec(plugin):
    extra = EXTRAS[plugin]
    return f'without the {extra} extra (pip install -e .[{extra}])'
  if not chip.torus and not (TARGETS / f'{name}.txtpb').exists():
    return f'without a description of {name} in moejax/plan/targets'
  return ''


def set_environment(topology: Topology) -> None:
  """Sets the environment in which JAX compiles ahead of time; call it before JAX is imported."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = {
    'cpu': f'--xla_force_host_platform_device_count={topology.count}',
    'gpu': '--xla_gpu_autotune_level=0',  # there is nothing to time kernels on
    'tpu': '',
  }[topology.compiler]
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
  if topology.compiler != 'cpu':
    # The persistent cache could not read a program for absent chips back.
    os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  # No chip is touched: libtpu need not ask for one, nor be alone, and any name of hosts keeps it
  # from complaining.
  os.environ.update(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5p-8',
  )
