"""`--plan --topology=NAME`: the devices of that name, and how a process must begin to compile for them.

argv -> asked (environment set) -> devices, which need not be here: TPUs by libtpu, GPUs by a description of theirs
"""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moejax.config import check
from moejax.runtime.chips import CHIPS, Chip

if TYPE_CHECKING:  # nothing here may import jax before the environment is set
  import jax

MODES = ('once', 'fit')
TARGETS = Path(__file__).parent / 'targets'
KNOWN = (
  'v5p:8x8x8 (TPU v4, v5p and tpu7x by three sizes, v5e:8x8 and v6e:16x16 by two), h200:256 (GPUs by their '
  f'number: {", ".join(name for name, chip in CHIPS.items() if not chip.torus)}), cpu:512 (virtual devices)'
)
# The plug-in that compiles for TPUs or GPUs -> the extra that installs it.
EXTRAS = {'libtpu': 'tpu', 'jax_cuda13_plugin': 'cuda'}


class Topology(NamedTuple):
  """Devices that need not be here."""

  text: str
  chip: Chip | None  # None: only virtual devices of the CPU, which are no chip
  sizes: tuple[int, ...]  # of the torus; of GPUs and virtual devices their number
  compiler: str  # 'tpu', 'gpu' or 'cpu': whose sizes and collectives they are
  note: str  # what to know of that, '' if nothing

  @property
  def count(self) -> int:
    """JAX devices."""
    return math.prod(self.sizes) * (self.chip.per_chip if self.chip else 1)

  def devices(self) -> 'list[jax.Device]':
    """In the order in which a mesh takes them.

    Raises:
      ConfigError: there is no such slice, or this process began without `prepare`.
    """
    import jax
    from jax.experimental import topologies

    if self.compiler == 'cpu':
      found = jax.devices('cpu')
      check(
        f'--topology={self.text}: this process has {len(found)} CPU devices: start it with XLA_FLAGS='
        f'--xla_force_host_platform_device_count={self.count}'
        if len(found) < self.count
        else ''
      )
      return found[: self.count]
    name = self.text.partition(':')[0]
    try:
      if self.compiler == 'tpu':
        # Of a v4, too, a device is a chip with its two cores.
        cores = {'chip_config_name': 'megacore'} if name == 'v4' else {}
        return topologies.get_topology_desc(
          topology_name=self.text, platform='tpu', **cores
        ).devices
      target, nodes = (TARGETS / f'{name}.txtpb').read_text(), max(1, self.count // self.chip.node)
      ask_target_not_here(target)
      return topologies.get_topology_desc(
        platform='cuda', topology=f'1x{nodes}x{self.count // nodes}', target_config=target
      ).devices
    except (RuntimeError, ValueError) as error:
      check(f'--topology={self.text}: {str(error).splitlines()[0]}: use one like {KNOWN}')
      raise


def ask_target_not_here(target: str) -> None:
  """What cuDNN's attention can do, JAX asks the GPU that is here; without one it would refuse heads wider than 128."""
  from jax._src.cudnn import fused_attention_stablehlo

  major = int(re.search(r'cuda_compute_capability \{ major: (\d+)', target)[1])
  fused_attention_stablehlo.check_compute_capability = lambda least: major >= float(least)


def read_plan_flags(argv: list[str]) -> tuple[str, Topology | None, list[str]]:
  """('once' or 'fit', what to plan for, the other arguments), the environment set; ('', None, argv) without --plan.

  Raises:
    ConfigError: an unknown topology, or one of the two flags without the other.
  """
  ours = [arg for arg in argv if arg.partition('=')[0] in ('--plan', '--topology')]
  if not ours:
    return '', None, argv
  flags = dict(
    arg.removeprefix('--').split('=', 1) if '=' in arg else (arg.removeprefix('--'), '')
    for arg in ours
  )
  check(
    '--topology is for --plan: add --plan, or --plan=fit' if 'plan' not in flags else '',
    f'--plan needs --topology=NAME of what to plan for: {KNOWN}'
    if not ('topology' in flags and flags['topology'])
    else '',
  )
  mode = flags['plan'] or 'once'
  check(
    f'--plan={mode}: use --plan, for the mesh of the config, or --plan=fit, to look for one'
    if mode not in MODES
    else ''
  )
  topology = parse_topology(flags['topology'])
  set_environment(topology)
  return mode, topology, [arg for arg in argv if arg not in ours]


def parse_topology(text: str) -> Topology:
  """'v5p:8x8x8', 'h200:256', 'cpu:512'.

  Raises:
    ConfigError: none of these.
  """
  name, _, size = text.partition(':')
  chip, problem = (
    CHIPS[name] if name in CHIPS else None,
    f'--topology={text} is not known: use one like {KNOWN}',
  )
  check(
    problem
    if name not in (*CHIPS, 'cpu') or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size)
    else ''
  )
  sizes = tuple(int(n) for n in size.split('x'))
  check(
    f'--topology={text}: {name} is by {max(1, chip.torus) if chip else 1} sizes, not {len(sizes)}: use one like '
    f'{KNOWN}'
    if len(sizes) != (max(1, chip.torus) if chip else 1)
    else '',
    f'--topology={text}: use 1 to {chip.node} GPUs or a multiple of {chip.node}, which are a node'
    if chip and chip.node and sizes[0] > chip.node and sizes[0] % chip.node
    else '',
  )
  if not chip:
    return Topology(
      text, None, sizes, 'cpu', "sizes and collectives are those of the CPU's compiler"
    )
  plugin = 'libtpu' if chip.torus else 'jax_cuda13_plugin'
  missing = (
    f'without the {EXTRAS[plugin]} extra (pip install -e .[{EXTRAS[plugin]}])'
    if not importlib.util.find_spec(plugin)
    else ''
    if chip.torus or (TARGETS / f'{name}.txtpb').exists()
    else f'without a description of {name} in moejax/targets'
  )
  if missing:
    return Topology(
      text, chip, sizes, 'cpu', f"{missing} sizes and collectives are those of the CPU's compiler"
    )
  return Topology(text, chip, sizes, 'tpu' if chip.torus else 'gpu', '')


def set_environment(topology: Topology) -> None:
  """Sets the environment. JAX reads it when it is imported: call this first."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = {
    'cpu': f'--xla_force_host_platform_device_count={topology.count}',
    'gpu': '--xla_gpu_autotune_level=0',
    'tpu': '',
  }[topology.compiler]
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
  if topology.compiler != 'cpu':
    os.environ['JAX_ENABLE_COMPILATION_CACHE'] = (
      'false'  # which could not read a program for absent chips back
    )
  # No chip is touched: libtpu need not ask for one, nor be alone, and any name of hosts keeps it from complaining.
  os.environ.update(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5p-8',
  )
