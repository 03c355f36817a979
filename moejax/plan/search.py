"""Which mesh, remat and number of micro-batches may fit and be fast, from shapes alone: nothing is compiled.

  config, mesh -> bytes of one device by kind, and seconds of a step -> the candidates, fastest first

A guess to order candidates by; the compiler then has the word. It said 67.1 GiB where this says 64, of DeepSeek-V3 on
512 TPU v5p, and 84.5 where this says 83, on 256 H200s; of small models on CPU see tests/test_plan.py.

Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token, T tokens of one device in one
micro-batch.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from moejax.config import ConfigError
from moejax.plan.memory_model import (
  Shapes,
  estimated_collectives,
  memory,
  moved_through_memory,
  shapes,
)
from moejax.plan.roofline import least_time, step_flops, time_bounds
from moejax.plan.topology import Topology
from moejax.sharding.divisibility import meshes_of
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import make_mesh
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters
from moejax.train.shapes import divided_parts

GUESS_MEMORY_FRACTION = 0.9  # of a chip's memory is what a guess may fill


class Guess(NamedTuple):
  """A config that differs from the user's in mesh, remat and micro-batches."""

  cfg: ExperimentConfig
  memory: dict[str, float]  # kind -> bytes on one device
  seconds: float  # of a step: half-way between everything overlapping, and nothing


def guess(
  cfg: ExperimentConfig, found: Shapes, devices: Sequence[jax.Device], topology: Topology
) -> Guess:
  """What a config would take. The time is infinite where the chip is not known."""
  seconds = math.inf
  if topology.chip:
    _, flops = step_flops(cfg, count_parameters(found.model, cfg))
    times = time_bounds(
      flops / len(devices),
      moved_through_memory(cfg, found, topology),
      estimated_collectives(cfg, found, topology),
      make_mesh(cfg.mesh, devices),
      topology,
    )
    seconds = (least_time(times)[0] + sum(bound.seconds for bound in times)) / 2
  return Guess(cfg, memory(cfg, found, topology), seconds)


def layout_variants(cfg: ExperimentConfig, number: int) -> Iterator[ExperimentConfig]:
  """The config on every mesh of so many devices that divides it, with every remat and number of micro-batches."""
  limits = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0]
  parts = [
    part
    for part in divided_parts(dataclasses.replace(cfg, micro_batches=1))
    if part.axes != RULES['batch']
  ]
  for mesh in meshes_of(number):
    if any(part.problem(mesh) for part in parts):
      continue
    for micro_batches in limits:
      if cfg.batch_size // micro_batches % (mesh.data * mesh.fsdp * mesh.expert):
        continue
      for remat in ('full', 'dots', 'none'):
        try:
          yield dataclasses.replace(
            cfg,
            mesh=mesh,
            micro_batches=micro_batches,
            model=dataclasses.replace(cfg.model, remat=remat),
          )
        except ConfigError:  # such as balance.ep_groups, which must go with micro_batches
          continue


def candidates(
  cfg: ExperimentConfig, devices: Sequence[jax.Device], topology: Topology
) -> list[Guess]:
  """Those that should fit, fastest first; if none should, the smallest."""
  found = shapes(cfg)
  limit = GUESS_MEMORY_FRACTION * topology.chip.memory if topology.chip else math.inf
  sized = [
    (sum(memory(one, found, topology).values()), one) for one in layout_variants(cfg, len(devices))
  ]
  fit = [one for size, one in sized if size <= limit]
  fit = fit or [one for _, one in sorted(sized, key=lambda pair: pair[0])[:1]]
  guesses = [guess(one, found, devices, topology) for one in fit]
  return sorted(guesses, key=lambda g: (g.seconds, sum(g.memory.values())))
