"""The least time that a step can take, given by the slowest of arithmetic, memory and links.

compiled text, mesh, chip -> seconds of each bound -> tokens/s and MFU at best
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moejax.model.config import ModelConfig
from moejax.plan.hlo.collectives import Collective
from moejax.plan.memory_model import is_in_windows
from moejax.plan.topology import Topology
from moejax.runtime.chips import Chip
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, flops_per_token


class StepFlops(NamedTuple):
  """The arithmetic of one step in FLOP, of all devices together."""

  model: float
  recomputing: float  # with what remat computes again


class Bound(NamedTuple):
  """One thing that takes time."""

  name: str
  seconds: float
  uses: tuple[str, ...]  # what it has for itself; the times of bounds that use the same add up


class Links(NamedTuple):
  """The links that a group of devices has to itself."""

  names: tuple[str, ...]
  bandwidth: float  # bytes/s that each device can send over all of them


class LeastTime(NamedTuple):
  """The least time of a step."""

  seconds: float
  rules: str  # the resource that is in use for so long


def step_flops(cfg: ExperimentConfig, parameters: Parameters, topology: Topology) -> StepFlops:
  """Returns the arithmetic of a step, of which the topology decides what TPUs compute twice."""
  tokens, useful = cfg.batch_size * cfg.seq_len, flops_per_token(parameters, cfg)
  again = recomputed_flops_per_token(cfg, parameters, topology)
  return StepFlops(tokens * useful, tokens * (useful + again))


def recomputed_flops_per_token(
  cfg: ExperimentConfig, parameters: Parameters, topology: Topology
) -> float:
  """Returns the FLOP of one token's products that are run again for the backward pass.

  They are those whose results it reads, and that the policy of model/remat does not keep.
  """
  model = cfg.model
  layers, remat = model.num_layers + model.mtp_depth, model.remat
  # As in flops_per_token: 2 for each number that multiplies, a third of forward and backward.
  embedding = 2 * parameters.embedding * (1 + model.mtp_depth)
  one_token = dataclasses.replace(cfg, seq_len=1)
  # What depends on the length of a sequence is attention's two products.
  forward = flops_per_token(parameters, cfg) / 3
  core = forward - flops_per_token(parameters, one_token) / 3
  router = 2 * model.d_model * model.moe.router.num_experts * model.num_moe_layers
  mtp_projection = 2 * 2 * model.d_model**2 * model.mtp_depth
  ffn = ffn_flops_per_token(model)
  projections = forward - core - embedding - router - mtp_projection - ffn.routed - ffn.other
  output = 2 * model.attention.output_width * model.d_model * layers
  full = projections + core + router + mtp_projection + ffn.routed_read + ffn.other_read
  again = {
    'none': 0.0,
    'all_but_attention': projections + core - (0 if model.sandwich_norm else output),
    'experts': full - ffn.routed_read - ffn.other_read,
    'dots': core + ffn.routed_read,
    'attention': full - core,
    'full': full,
  }[remat]
  keeps_routed = remat in ('none', 'all_but_attention', 'experts')
  # Their gate and up are run again whatever the policy says.
  return again + (2 / 3 * ffn.routed if keeps_routed and is_in_windows(cfg, topology) else 0)


class FfnFlops(NamedTuple):
  """The forward FLOP of one token's FFNs: routed experts, and shared ones and dense layers."""

  routed: float
  other: float
  # Of the products whose results the backward pass reads: gate and up, and down in some layers.
  routed_read: float
  other_read: float


def ffn_flops_per_token(model: ModelConfig) -> FfnFlops:
  """Returns what the FFNs of all layers compute for a token.

  The product with `down` is read where a norm comes after it, as in blocks of multi-token
  prediction, and with a capacity for the gradient of the experts' weights.
  """
  moe, moe_layers = model.moe, model.num_moe_layers
  dense_layers = model.num_layers + model.mtp_depth - moe_layers
  # Three matrices multiply: gate, up and down.
  unit = 2 * 3 * model.d_model
  routed, shared = unit * moe.d_expert * moe.router.top_k, unit * moe.shared_width
  dense = unit * model.d_ff * dense_layers
  read = moe_layers if model.sandwich_norm else model.mtp_depth
  routed_read = moe_layers if moe.dispatch.capacity_factor else read
  return FfnFlops(
    routed=routed * moe_layers,
    other=shared * moe_layers + dense,
    routed_read=routed * (2 * moe_layers + routed_read) / 3,
    other_read=shared * (2 * moe_layers + read) / 3 + dense * (2 + model.sandwich_norm) / 3,
  )


def group_places(mesh: Mesh, axes: Sequence[str], topology: Topology) -> np.ndarray:
  """Returns where the n devices of one group over these mesh axes are.

  They are coordinates [n, torus axes], or, of GPUs, the numbers of the devices [n, 1].
  """
  along = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
  group = mesh.devices[along].reshape(-1)
  chip = topology.chip
  if topology.compiler == 'tpu':
    return np.array([device.coords for device in group])
  ids = np.array([device.id for device in group])
  if chip.torus:  # virtual devices that stand in for TPUs, numbered in row-major order
    return np.stack(np.unravel_index(ids // chip.per_chip, topology.sizes), -1)
  return ids[:, None]


def group_links(places: np.ndarray, sizes: Sequence[int], chip: Chip) -> Links:
  """Returns which links a group of devices has to itself, and what each device can send over them.

  TPU: the torus axes that the group spans; both directions of one that is a closed ring. GPU:
    NVLink within a node;
  else the network, of as many GPUs as the group has in a node, since a ring enters and leaves each
  node once.

  Args:
    places: from `group_places`.
    sizes: chips along each axis of the torus.
    chip: whose links they are.
  """
  if chip.torus:
    spans = [axis for axis in range(chip.torus) if len(set(places[:, axis])) > 1]
    if not spans:
      # Two devices of a chip talk over links of their own, which are not slower.
      return Links(('chip',), chip.link)
    directions = len(spans)
    for axis in spans:
      is_whole = len(set(places[:, axis])) == sizes[axis]
      directions += is_whole and sizes[axis] >= chip.wraps
    return Links(tuple(f'ICI {"xyz"[axis]}' for axis in spans), chip.link * directions)
  nodes = len(set(places[:, 0] // chip.node))
  if nodes == 1:
    return Links(('NVLink',), chip.link)
  return Links(('network',), min(chip.link, chip.network * len(places) / nodes))


def time_bounds(
  flops: float, moved: float, sent: Sequence[Collective], mesh: Mesh, topology: Topology
) -> list[Bound]:
  """Returns what takes time in a step: arithmetic, memory, the links of each group of devices.

  Args:
    flops: FLOP of one device, recomputation included.
    moved: bytes through the memory of one device.
    sent: the collectives of a step.
    mesh: of the devices.
    topology: says where they are; its chip must be known.
  """
  chip = topology.chip
  bounds = [
    Bound('compute', flops / chip.flops, ('compute',)),
    Bound('memory', moved / chip.hbm, ('memory',)),
  ]
  bytes_over: dict[tuple[str, ...], float] = {}
  for collective in sent:
    # Groups that are no product of mesh axes may be anywhere: as if they spanned all devices.
    axes = collective.axes or tuple(mesh.axis_names)
    bytes_over.setdefault(axes, 0.0)
    bytes_over[axes] += collective.bytes
  for axes, size in bytes_over.items():
    links = group_links(group_places(mesh, axes, topology), topology.sizes, chip)
    name = f'{"+".join(axes)} over {", ".join(links.names)}, {links.bandwidth / 1e9:.0f} GB/s'
    bounds.append(Bound(name, size / links.bandwidth, links.names))
  return bounds


def least_time(bounds: Sequence[Bound]) -> LeastTime:
  """Returns the least time of a step, in which everything overlaps but what uses the same."""
  seconds: dict[str, float] = {}
  for bound in bounds:
    for use in bound.uses:
      seconds.setdefault(use, 0.0)
      seconds[use] += bound.seconds
  rules = max(seconds, key=lambda use: seconds[use])
  return LeastTime(seconds[rules], rules)


def mfu_ceiling(seconds: float, flops: float, devices: int, chip: Chip) -> float:
  """Returns the MFU of a step of so many seconds; 0 where the time is not known.

  Args:
    seconds: of the step.
    flops: FLOP of the model without recomputation, all devices together.
    devices: how many there are.
    chip: what they are.
  """
  return flops / (seconds * devices * chip.flops) if math.isfinite(seconds) and seconds > 0 else 0.0
