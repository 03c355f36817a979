"""Which mesh, remat and micro-batches may fit and be fast, from shapes: nothing is compiled.

  config, mesh -> bytes of one device by kind, and seconds of a step -> the candidates, fastest
  first

A guess orders the candidates; the compiler then decides which of them fits. It said 67.1 GiB where
the guess is 64, of DeepSeek-V3 on 512 TPU v5p, and 84.5 where it is 83, on 256 H200s;
tests/plan/test_planner.py holds both together for small models on the CPU.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from moejax.config import ConfigError
from moejax.plan.memory_model import ModelShapes, memory_by_kind, model_shapes
from moejax.plan.roofline import least_time, step_flops, time_bounds
from moejax.plan.topology import Topology
from moejax.plan.traffic_model import estimated_collectives, memory_traffic
from moejax.sharding.divisibility import meshes_of
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import make_mesh
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters
from moejax.train.shapes import divided_parts

# Of a chip's memory, what a guess may fill; PLAN_MEMORY_FRACTION is of what the compiler says,
# which is surer.
GUESS_MEMORY_FRACTION = 0.9
# Least memory first.
REMATS = ('full', 'attention', 'dots', 'experts', 'all_but_attention', 'none')


class Guess(NamedTuple):
  """What a config may take, which is the user's with another mesh, remat or micro-batches."""

  cfg: ExperimentConfig
  memory: dict[str, float]  # kind -> bytes on one device
  seconds: float  # of a step: half-way between everything overlapping, and nothing


def guess(
  cfg: ExperimentConfig, shapes: ModelShapes, devices: Sequence[jax.Device], topology: Topology
) -> Guess:
  """Returns what a config may take. The time is infinite where the chip is not known."""
  seconds = math.inf
  if topology.chip:
    flops = step_flops(cfg, count_parameters(shapes.model, cfg), topology)
    bounds = time_bounds(
      flops=flops.recomputing / len(devices),
      moved=memory_traffic(cfg, shapes, topology),
      sent=estimated_collectives(cfg, shapes, topology),
      mesh=make_mesh(cfg.mesh, devices),
      topology=topology,
    )
    seconds = (least_time(bounds).seconds + sum(bound.seconds for bound in bounds)) / 2
  return Guess(cfg, memory_by_kind(cfg, shapes, topology), seconds)


def layout_variants(cfg: ExperimentConfig, number: int) -> Iterator[ExperimentConfig]:
  """Yields the config on every mesh of so many devices, with every remat and micro-batches.

  Meshes that do not divide the model, and rows that do not divide over the devices, are left out.
  """
  divisors = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0]
  # The rows of a micro-batch are held against the mesh below, as their number changes.
  all_parts = divided_parts(dataclasses.replace(cfg, micro_batches=1))
  parts = [part for part in all_parts if part.axes != RULES['batch']]
  for mesh in meshes_of(number):
    if any(part.problem(mesh) for part in parts):
      continue
    for micro_batches in divisors:
      if cfg.batch_size // micro_batches % (mesh.data * mesh.fsdp * mesh.expert):
        continue
      for remat in REMATS:
        model = dataclasses.replace(cfg.model, remat=remat)
        try:
          yield dataclasses.replace(cfg, mesh=mesh, micro_batches=micro_batches, model=model)
        except ConfigError:  # such as balance.ep_groups, which must go with micro_batches
          continue


def candidates(
  cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology
) -> list[Guess]:
  """Returns those that should fit, fastest first; if none should, the smallest."""
  shapes = model_shapes(cfg)
  limit = GUESS_MEMORY_FRACTION * topology.chip.memory if topology.chip else math.inf
  variants = list(layout_variants(cfg, len(devices)))
  sizes = [sum(memory_by_kind(one, shapes, topology).values()) for one in variants]
  fitting = [one for one, size in zip(variants, sizes) if size <= limit]
  if not fitting and variants:
    fitting = [variants[sizes.index(min(sizes))]]
  # Only those that fit are timed, which needs a mesh of the devices for each.
  guesses = [guess(one, shapes, devices, topology) for one in fitting]
  return sorted(guesses, key=lambda one: (one.seconds, sum(one.memory.values())))
