"""The least time that a step can take: arithmetic, memory and links, each by itself, the slowest rules.

compiled text, mesh, chip -> seconds of each bound -> tokens/s and MFU at best
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moejax.plan.hlo.collectives import Collective
from moejax.plan.topology import Topology
from moejax.runtime.chips import Chip
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, flops_per_token


class Bound(NamedTuple):
  """One thing that takes time. `uses`: what it has for itself; bounds that use the same add up."""

  name: str
  seconds: float
  uses: tuple[str, ...]


def step_flops(cfg: ExperimentConfig, parameters: Parameters) -> tuple[float, float]:
  """(of the model, with what remat computes again) in one step, all devices together.

  'full' runs the forward pass of all blocks again, 'dots' of routed experts and attention's products.
  """
  model, tokens = cfg.model, cfg.batch_size * cfg.seq_len
  useful = flops_per_token(parameters, cfg)
  heads = 6 * parameters.embedding * (1 + model.mtp_depth)
  no_rows = dataclasses.replace(cfg, seq_len=1)
  attention = useful - flops_per_token(parameters, no_rows)
  routed = (
    6 * 3 * model.d_model * model.moe.d_expert * model.moe.router.top_k * model.num_moe_layers
  )
  again = {'none': 0.0, 'dots': attention + routed, 'full': useful - heads}[model.remat]
  return tokens * useful, tokens * (useful + again / 3)


def places(mesh: Mesh, axes: Sequence[str], topology: Topology) -> np.ndarray:
  """Where the devices of one group over these mesh axes are: [n, torus axes], or their numbers [n, 1]."""
  group = mesh.devices[
    tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  ].reshape(-1)
  chip = topology.chip
  if topology.compiler == 'tpu':
    return np.array([device.coords for device in group])
  ids = np.array([device.id for device in group])
  return (
    np.stack(np.unravel_index(ids // chip.per_chip, topology.sizes), -1)
    if chip.torus
    else ids[:, None]
  )


def links(where: np.ndarray, sizes: Sequence[int], chip: Chip) -> tuple[tuple[str, ...], float]:
  """Which links a group of devices has to itself, and the bytes/s that each of them can send over these.

  TPU: the torus axes that the group spans; both directions of one that is a closed ring. GPU: NVLink within a node;
  else the network, of as many GPUs as the group has in a node, since a ring enters and leaves each node once.
  """
  if chip.torus:
    spans = [i for i in range(chip.torus) if len(set(where[:, i])) > 1]
    closed = [len(set(where[:, i])) == sizes[i] >= chip.wraps for i in spans]
    # Two devices of a chip talk over links of their own, which are not slower.
    return tuple(f'ICI {"xyz"[i]}' for i in spans) or ('chip',), chip.link * max(
      1, sum(1 + ring for ring in closed)
    )
  nodes = len(set(where[:, 0] // chip.node))
  if nodes == 1:
    return ('NVLink',), chip.link
  return ('network',), min(chip.link, chip.network * len(where) / nodes)


def time_bounds(
  flops: float, moved: float, spoken: Sequence[Collective], mesh: Mesh, topology: Topology
) -> list[Bound]:
  """flops: of one device, recomputation included.  moved: bytes through its memory."""
  chip = topology.chip
  found = [
    Bound('compute', flops / chip.flops, ('compute',)),
    Bound('memory', moved / chip.hbm, ('memory',)),
  ]
  sent: dict[tuple[str, ...], float] = {}
  for collective in spoken:
    axes = collective.axes or tuple(mesh.axis_names)
    sent[axes] = (sent[axes] if axes in sent else 0.0) + collective.bytes
  for axes, size in sent.items():
    uses, bandwidth = links(places(mesh, axes, topology), topology.sizes, chip)
    found.append(
      Bound(
        f'{"+".join(axes)} over {", ".join(uses)}, {bandwidth / 1e9:.0f} GB/s',
        size / bandwidth,
        uses,
      )
    )
  return found


def least_time(found: Sequence[Bound]) -> tuple[float, str]:
  """(seconds, what takes them): everything overlaps but what uses the same."""
  total: dict[str, float] = dict.fromkeys((use for bound in found for use in bound.uses), 0.0)
  for bound in found:
    for use in bound.uses:
      total[use] += bound.seconds
  use = max(total, key=lambda use: total[use])
  return total[use], use


def mfu_ceiling(seconds: float, flops: float, devices: int, chip: Chip) -> float:
  """MFU of a step of so many seconds; flops of the model, all devices together."""
  return flops / (seconds * devices * chip.flops) if math.isfinite(seconds) and seconds > 0 else 0.0
