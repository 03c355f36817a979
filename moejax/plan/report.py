"""A plan in words: parameters, arithmetic, memory, collectives, time of a step, remedies."""

import dataclasses
import math
from typing import NamedTuple

from jax.sharding import Mesh

from moejax.plan.hlo.collectives import Collective, collectives
from moejax.plan.hlo.memory_traffic import traffic
from moejax.plan.memory_model import memory_by_kind, model_shapes
from moejax.plan.remedies import remedy_configs
from moejax.plan.roofline import Bound, StepFlops, least_time, mfu_ceiling, step_flops, time_bounds
from moejax.plan.topology import Topology
from moejax.runtime.units import human
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, flops_per_token

# Of a device's memory, what may be planned for: the rest goes to what others hold, and to pieces
# too small.
PLAN_MEMORY_FRACTION = 0.96


class CompiledStep(NamedTuple):
  """What the compiler says of a step; `text` is '' where it refused because of memory."""

  cfg: ExperimentConfig
  mesh: Mesh
  parameters: Parameters
  memory: dict[str, float]  # kind -> bytes on one device, all kinds together what the step needs
  text: str  # of the compiled program


def needed_bytes(step: CompiledStep) -> float:
  """Returns the bytes that a device must have; NaN where the compiler refused without a figure."""
  return sum(step.memory.values())


def fits(step: CompiledStep, topology: Topology) -> bool:
  """Returns whether a device has the memory; what a CPU will have is not known, and is enough."""
  if not step.text:
    return False
  chip = topology.chip
  return chip is None or needed_bytes(step) <= PLAN_MEMORY_FRACTION * chip.memory


def describe_layout(cfg: ExperimentConfig) -> str:
  """Returns in words what a plan may change: mesh, remat and micro-batches."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in dataclasses.asdict(cfg.mesh).items())
  return f'{mesh}, remat {cfg.model.remat}, {cfg.micro_batches} micro-batches'


def plan_lines(step: CompiledStep, topology: Topology) -> list[str]:
  """Returns the lines of a plan, for a person to read."""
  flops = step_flops(step.cfg, step.parameters, topology)
  lines = heading_lines(step, flops, topology) + memory_lines(step, topology)
  if step.text:
    sent = collectives(step.text, step.mesh.shape)
    lines += collective_lines(sent)
    if topology.chip:
      # As the compiler has it, not as the models of memory and traffic guess.
      bounds = time_bounds(
        flops=flops.recomputing / step.mesh.size,
        moved=traffic(step.text),
        sent=sent,
        mesh=step.mesh,
        topology=topology,
      )
      lines += time_lines(bounds, step, topology)
  return lines + remedy_lines(step, topology)


def heading_lines(step: CompiledStep, flops: StepFlops, topology: Topology) -> list[str]:
  """Returns what is planned for, the flags that give it, the size of the model and of a step."""
  cfg, parameters = step.cfg, step.parameters
  lines = [f'plan of {cfg.workdir} on {topology.text}: {step.mesh.size} devices']
  if topology.note:
    lines.append(f'note        {topology.note}')
  flags = [f'--config.mesh.{axis}={size}' for axis, size in step.mesh.shape.items()]
  flags += [f'--config.model.remat={cfg.model.remat}']
  flags += [f'--config.micro_batches={cfg.micro_batches}']
  tokens = cfg.batch_size * cfg.seq_len
  return lines + [
    f'flags       {" ".join(flags)}',
    f'model       {human(parameters.total)} parameters, {human(parameters.active)} active',
    f'arithmetic  {human(flops_per_token(parameters, cfg))}FLOP a token, '
    f'{human(flops.model)}FLOP a step of {human(tokens)} tokens; '
    f'with recomputation {human(flops.recomputing)}FLOP',
  ]


def memory_lines(step: CompiledStep, topology: Topology) -> list[str]:
  """Returns each kind of memory, and all of it beside what a device has."""
  needed, share = needed_bytes(step), ''
  if topology.chip:
    has = topology.chip.memory
    share = f', {needed / has:.0%} of the {human(has, 1024)}B that it has'
  return [
    '',
    'bytes on one device',
    *(f'  {kind:<44}{human(size, 1024):>9}B' for kind, size in step.memory.items()),
    f'  {"all":<44}{human(needed, 1024):>9}B{share}',
  ]


def collective_lines(sent: list[Collective]) -> list[str]:
  """Returns a line for each kind of collective and mesh axes."""
  lines = ['', 'collectives of one step, bytes that a device sends']
  for each in sent:
    axes = '+'.join(each.axes) or 'parts of axes'
    lines.append(f'  {each.kind:<20}{axes:<24}{each.count:>9} times {human(each.bytes):>9}B')
  return lines


def time_lines(bounds: list[Bound], step: CompiledStep, topology: Topology) -> list[str]:
  """Returns each bound of a step's time, and the speed that follows from the one that rules."""
  least, apart = least_time(bounds), sum(bound.seconds for bound in bounds)
  tokens = step.cfg.batch_size * step.cfg.seq_len
  flops = tokens * flops_per_token(step.parameters, step.cfg)

  def speed(seconds: float) -> str:
    mfu = mfu_ceiling(seconds, flops, step.mesh.size, topology.chip)
    return f'{human(tokens / seconds)}tokens/s, MFU {mfu:.1%}'

  lines = ['', 'least time of a step: arithmetic, memory and links at their rated speed']
  for bound in bounds:
    share = bound.seconds / least.seconds
    lines.append(f'  {bound.name:<52}{bound.seconds:>9.3g} s {share:>6.0%}')
  return lines + [
    f'  {least.rules} rules: {least.seconds:.3g} s a step at least, {speed(least.seconds)}',
    f'  if nothing overlapped: {apart:.3g} s, {speed(apart)}',
  ]


def remedy_lines(step: CompiledStep, topology: Topology) -> list[str]:
  """Returns what would make the step fit, if it does not, with a guess of what each would give."""
  if topology.chip is None:
    return ['', 'what a CPU has is not compared']
  if fits(step, topology):
    return ['', 'it fits']
  has, needed = topology.chip.memory, needed_bytes(step)
  is_known = not math.isnan(needed)
  missing = ''
  if is_known:
    too_little = human(needed - PLAN_MEMORY_FRACTION * has, 1024)
    missing = f', of which {PLAN_MEMORY_FRACTION:.0%} may be planned for: {too_little}B too little'
  lines = ['', f'it does not fit: a device has {human(has, 1024)}B{missing}. What would help:']
  # A remedy is worth the difference of two guesses, added to what the compiler said.
  shapes = model_shapes(step.cfg)
  before = sum(memory_by_kind(step.cfg, shapes, topology).values())
  for flags, cfg in remedy_configs(step.cfg).items():
    after = needed - before + sum(memory_by_kind(cfg, shapes, topology).values())
    if not is_known:
      lines.append(f'  {flags}')
    elif after < needed:
      lines.append(f'  {flags}: about {human(after, 1024)}B')
  return lines + [
    '  more devices, or --plan=fit to look for a mesh, remat and micro-batches that fit'
  ]
