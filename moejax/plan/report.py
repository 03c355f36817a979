"""A plan in words: parameters, arithmetic, memory by kind, collectives, the least time of a step, and remedies."""

import contextlib
import dataclasses
import math
from typing import NamedTuple

from jax.sharding import Mesh

from moejax.config import ConfigError
from moejax.plan.hlo.collectives import collectives
from moejax.plan.hlo.memory_traffic import traffic
from moejax.plan.memory_model import memory, shapes
from moejax.plan.roofline import Bound, least_time, mfu_ceiling, step_flops, time_bounds
from moejax.plan.topology import Topology
from moejax.runtime.units import human
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, flops_per_token
from moejax.train.shapes import divided_parts

PLAN_MEMORY_FRACTION = 0.96  # of a device's memory may be planned for: the rest goes to what others hold, and to pieces too small


class Compiled(NamedTuple):
  """What the compiler says of a step; `text` is '' where it refused because of memory."""

  cfg: ExperimentConfig
  mesh: Mesh
  parameters: Parameters
  memory: dict[str, float]  # kind -> bytes on one device, all kinds together what the step needs
  text: str


def total(done: Compiled) -> float:
  """Bytes that a device must have."""
  return sum(done.memory.values())


def fits(done: Compiled, topology: Topology) -> bool:
  """Whether a device has them, and a little more; nobody knows what a CPU will have."""
  return bool(done.text) and (
    topology.chip is None or total(done) <= PLAN_MEMORY_FRACTION * topology.chip.memory
  )


def describe_layout(cfg: ExperimentConfig) -> str:
  """What a plan may change, in words."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in dataclasses.asdict(cfg.mesh).items())
  return f'{mesh}, remat {cfg.model.remat}, {cfg.micro_batches} micro-batches'


def plan_lines(done: Compiled, topology: Topology) -> list[str]:
  """The plan for a person."""
  cfg, parameters, devices = done.cfg, done.parameters, done.mesh.size
  useful, all_flops = step_flops(cfg, parameters)
  spoken = collectives(done.text, done.mesh.shape) if done.text else []
  flags = ' '.join(f'--config.mesh.{axis}={size}' for axis, size in done.mesh.shape.items())
  lines = [
    f'plan of {cfg.workdir} on {topology.text}: {devices} devices',
    *([f'note        {topology.note}'] if topology.note else []),
    f'flags       {flags} --config.model.remat={cfg.model.remat} --config.micro_batches={cfg.micro_batches}',
    f'model       {human(parameters.total)} parameters, {human(parameters.active)} active',
    f'arithmetic  {human(flops_per_token(parameters, cfg))}FLOP a token, {human(useful)}FLOP a step of '
    f'{human(cfg.batch_size * cfg.seq_len)} tokens; with recomputation {human(all_flops)}FLOP',
  ]
  lines += memory_lines(done, topology)
  if done.text:
    lines += [
      '',
      'collectives of one step, bytes that a device sends',
      *(
        f'  {c.kind:<20}{"+".join(c.axes) or "parts of axes":<24}{c.count:>9} times {human(c.bytes):>9}B'
        for c in spoken
      ),
    ]
  if done.text and topology.chip:
    lines += time_lines(
      time_bounds(all_flops / devices, traffic(done.text), spoken, done.mesh, topology),
      done,
      topology,
    )
  return lines + remedies(done, topology)


def memory_lines(done: Compiled, topology: Topology) -> list[str]:
  """Each kind of memory, and all of it beside what a device has."""
  has = topology.chip.memory if topology.chip else math.inf
  share = (
    f', {total(done) / has:.0%} of the {human(has, 1024)}B that it has' if topology.chip else ''
  )
  return [
    '',
    'bytes on one device',
    *(f'  {kind:<44}{human(size, 1024):>9}B' for kind, size in done.memory.items()),
    f'  {"all":<44}{human(total(done), 1024):>9}B{share}',
  ]


def time_lines(found: list[Bound], done: Compiled, topology: Topology) -> list[str]:
  """Each bound of a step's time, and what follows from the one that rules."""
  seconds, rules = least_time(found)
  cfg, (useful, _) = done.cfg, step_flops(done.cfg, done.parameters)
  apart = sum(bound.seconds for bound in found)
  tokens = cfg.batch_size * cfg.seq_len

  def at(time: float) -> str:
    return f'{human(tokens / time)}tokens/s, MFU {mfu_ceiling(time, useful, done.mesh.size, topology.chip):.1%}'

  return [
    '',
    'least time of a step: arithmetic, memory and links at their rated speed',
    *(
      f'  {bound.name:<52}{bound.seconds:>9.3g} s {bound.seconds / seconds:>6.0%}'
      for bound in found
    ),
    f'  {rules} rules: {seconds:.3g} s a step at least, {at(seconds)}',
    f'  if nothing overlapped: {apart:.3g} s, {at(apart)}',
  ]


def remedies(done: Compiled, topology: Topology) -> list[str]:
  """What would make it fit, if it does not, with a guess of what each would give."""
  if topology.chip is None or fits(done, topology):
    return ['', 'it fits' if topology.chip else 'what a CPU has is not compared']
  found, has = shapes(done.cfg), topology.chip.memory
  before = sum(memory(done.cfg, found, topology).values())

  def after(cfg: ExperimentConfig) -> float:
    return total(done) - before + sum(memory(cfg, found, topology).values())

  known = not math.isnan(total(done))
  return [
    '',
    f'it does not fit: a device has {human(has, 1024)}B'
    + (
      f', of which {PLAN_MEMORY_FRACTION:.0%} may be planned for: {human(total(done) - PLAN_MEMORY_FRACTION * has, 1024)}B too little'
      if known
      else ''
    )
    + '. What would help:',
    *(
      f'  {flags}' + (f': about {human(after(cfg), 1024)}B' if known else '')
      for flags, cfg in options(done.cfg).items()
      if after(cfg) < total(done) or not known
    ),
    '  more devices, or --plan=fit to look for a mesh, remat and micro-batches that fit',
  ]


def options(cfg: ExperimentConfig) -> dict[str, ExperimentConfig]:
  """Flags -> the config with them: remat, smaller micro-batches, more fsdp; those that the model and batch allow."""
  mesh, model, rows = cfg.mesh, cfg.model, cfg.batch_size // cfg.micro_batches
  shards = mesh.data * mesh.fsdp * mesh.expert
  smaller = [n for n in range(shards, rows, shards) if cfg.batch_size % n == 0]
  changes: dict[str, dict[str, object]] = {
    '--config.model.remat=full': {'model': dataclasses.replace(model, remat='full')},
    **{
      f'--config.micro_batches={cfg.batch_size // n}': {'micro_batches': cfg.batch_size // n}
      for n in smaller[::-1]
    },
    **{
      f'--config.mesh.{axis}={getattr(mesh, axis) // 2} --config.mesh.fsdp={2 * mesh.fsdp}': {
        'mesh': dataclasses.replace(mesh, fsdp=2 * mesh.fsdp, **{axis: getattr(mesh, axis) // 2})
      }
      for axis in ('data', 'tensor')
      if getattr(mesh, axis) % 2 == 0 and getattr(mesh, axis)
    },
  }
  found: dict[str, ExperimentConfig] = {}
  for flags, change in changes.items():
    with contextlib.suppress(
      ConfigError
    ):  # such as balance.ep_groups, which must go with micro_batches
      other = dataclasses.replace(cfg, **change)
      if other != cfg and not any(part.problem(other.mesh) for part in divided_parts(other)):
        found[flags] = other
  return found
