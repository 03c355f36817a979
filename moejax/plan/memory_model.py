"""An estimate of the memory that a training step takes on one device, by kind, without compiling it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from moejax.model.transformer import Transformer
from moejax.moe.dispatch.dispatchers import exchange_of
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.plan.hlo.collectives import Collective
from moejax.plan.topology import Topology
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MeshConfig
from moejax.sharding.params import is_param, param_axes
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import state_shapes


class Shapes(NamedTuple):
  """A model's parameters: (numbers, logical axes, is it a stack of layers) of each."""

  model: Transformer
  rows: tuple[tuple[int, tuple[str, ...], bool], ...]

  def count(self, mesh: MeshConfig, *whole: str) -> float:
    """Numbers on one device; over the mesh axes `whole` they are not split."""
    return sum(size / shards(mesh, axes, whole) for size, axes, _ in self.rows)


def shapes(cfg: ExperimentConfig) -> Shapes:
  """Of a config's model."""
  model = state_shapes(cfg).model
  params = [p for p in jax.tree.leaves(model, is_leaf=is_param) if is_param(p)]
  return Shapes(
    model, tuple((math.prod(p.shape), param_axes(p), param_axes(p)[0] == 'layer') for p in params)
  )


def shards(mesh: MeshConfig, axes: Sequence[str], whole: Sequence[str]) -> int:
  """Into how many parts an array of these logical axes is cut."""
  return math.prod(
    getattr(mesh, name) for axis in axes if axis for name in RULES[axis] if name not in whole
  )


def tokens_per_device(cfg: ExperimentConfig, mesh: MeshConfig) -> int:
  """T."""
  return cfg.batch_size // cfg.micro_batches * cfg.seq_len // (mesh.data * mesh.fsdp * mesh.expert)


class Exchanged(NamedTuple):
  """What the exchange of one layer does to a device."""

  sent: float  # bytes over `expert` in the forward pass
  room: float  # rows [D] that may arrive
  copies: float  # rows that the experts' products hold at once


def exchanged(cfg: ExperimentConfig, mesh: MeshConfig, topology: Topology) -> Exchanged:
  """TPUs take copies a window at a time, see moejax/moe/ragged.py; elsewhere there is room for all that may come."""
  model, tokens = cfg.model, tokens_per_device(cfg, mesh)
  router, here = model.moe.router, model.moe.router.num_experts // mesh.expert
  if mesh.expert == 1:
    return Exchanged(0.0, tokens, tokens * router.top_k)
  group = Group(
    mesh.expert, tokens, router.top_k, router.num_experts, model.d_model, itemsize_of(cfg), 0
  )
  device = AbstractDevice(
    topology.chip.kind if topology.chip else 'cpu', None, platform=topology.compiler
  )
  lacking = lacking_ragged(AbstractMesh((topology.count,), ('expert',), abstract_device=device))
  name = (
    exchange_of(model.moe.dispatch, group, lacking)
    if not model.moe.dispatch.capacity_factor
    else 'gather'
  )
  each = min(router.top_k, here) if name == 'ragged' else router.top_k
  copies = tokens * each * (1.25 if topology.compiler == 'tpu' else mesh.expert)
  return Exchanged(
    exchange_bytes(group)[name], mesh.expert * tokens * (each if name == 'ragged' else 1), copies
  )


def itemsize_of(cfg: ExperimentConfig) -> int:
  """Bytes of a number in the compute dtype."""
  return 4 if cfg.model.dtype == 'float32' else 2


def saved_activation_bytes(cfg: ExperimentConfig, moves: Exchanged, topology: Topology) -> float:
  """Bytes that the forward pass of one micro-batch keeps for the backward pass."""
  model, mesh, tokens = cfg.model, cfg.mesh, tokens_per_device(cfg, cfg.mesh)
  attention, moe, layers = model.attention, model.moe, model.num_layers + model.mtp_depth
  residual = tokens * model.d_model
  if model.remat == 'full':
    return layers * residual * itemsize_of(cfg)
  latent = attention.latent
  low = (latent.kv_rank + latent.q_rank) if latent.kv_rank else 0
  heads = (
    attention.num_heads
    * (4 * attention.d_head + 2 * (latent.d_rope if latent.kv_rank else 0))
    / mesh.tensor
  )
  shared = 2 * moe.num_shared * moe.d_expert / mesh.tensor
  dots = tokens * (heads + low + shared + model.d_model)
  dense = tokens * 2 * model.d_ff / mesh.tensor * model.num_dense_layers
  if model.remat == 'dots':
    return (layers * (residual + dots) + dense) * itemsize_of(cfg)
  scores = (
    2 * tokens * cfg.seq_len * attention.num_heads / mesh.tensor * (topology.compiler == 'cpu')
  )
  hidden = 0.0 if topology.compiler == 'tpu' else moves.copies * 2 * moe.d_expert / mesh.tensor
  experts = moves.room * model.d_model + hidden + 6 * residual
  return (layers * (residual + 2 * dots + scores + experts) + 2 * dense) * itemsize_of(cfg)


def peak_temporary_bytes(
  cfg: ExperimentConfig, moves: Exchanged, found: Shapes, topology: Topology
) -> float:
  """Bytes of the backward pass of one block, or of the head: weights gathered over fsdp, rows of experts, scores."""
  model, mesh, tokens, itemsize = (
    cfg.model,
    cfg.mesh,
    tokens_per_device(cfg, cfg.mesh),
    itemsize_of(cfg),
  )
  layers = model.num_layers + model.mtp_depth
  weights = (
    sum(size / shards(mesh, axes, ('fsdp',)) for size, axes, stacked in found.rows if stacked)
    / layers
  )
  # Without a kernel that never holds them: four chunks of queries each see half of the keys, on average.
  scores = (
    model.attention.num_heads / mesh.tensor * tokens * cfg.seq_len * 5
    if topology.compiler == 'cpu'
    else 0.0
  )
  wide = 4 * model.d_model if topology.compiler == 'tpu' else 0
  experts = (
    moves.copies * (wide + 4 * model.moe.d_expert / mesh.tensor) + moves.room * 3 * model.d_model
  )
  # Gathered, cast, and their gradient; TPUs lay most of these out anew for their grouped products.
  forms = 8 if topology.compiler == 'tpu' else 3
  block = (weights * forms + 12 * tokens * model.d_model) * itemsize + max(
    scores, experts * itemsize
  )
  vocab = model.vocab_size / mesh.tensor
  head = tokens / cfg.loss.chunks * vocab * 8 + model.d_model * vocab * (itemsize * 2 + 4)
  # XLA casts the stacks of all layers at once, before the loop over them.
  cast = found.count(mesh) * itemsize if itemsize < 4 else 0.0
  return cast + max(block, head)


def memory(cfg: ExperimentConfig, found: Shapes, topology: Topology) -> dict[str, float]:
  """Kind -> bytes on one device, at the fullest moment of a step."""
  own, moves = 4 * found.count(cfg.mesh), exchanged(cfg, cfg.mesh, topology)
  return {
    'parameters': own,
    'optimiser': 2 * own,
    'gradients': own * (2 if cfg.micro_batches > 1 else 1),
    'activations': saved_activation_bytes(cfg, moves, topology),
    'other temporaries': peak_temporary_bytes(cfg, moves, found, topology),
  }


def estimated_collectives(
  cfg: ExperimentConfig, found: Shapes, topology: Topology
) -> list[Collective]:
  """The collectives of a step, guessed: weights gathered, gradients scattered, tokens exchanged, sums over tensor."""
  mesh, model, parts = cfg.mesh, cfg.model, cfg.micro_batches
  itemsize, again = itemsize_of(cfg), 0 if model.remat == 'none' else 1
  layers = model.num_layers + model.mtp_depth
  own, gathered, tokens = found.count(mesh), found.count(mesh, 'fsdp'), tokens_per_device(cfg, mesh)
  sent = exchanged(cfg, mesh, topology).sent
  sizes = {
    'fsdp': (gathered - own) * itemsize * (2 + again + 1),
    'data': 2 * own * 4 * (mesh.data - 1) / mesh.data,
    'expert': sent * layers * (2 + again),
    'tensor': 2
    * tokens
    * model.d_model
    * itemsize
    * 2
    * layers
    * (2 + again)
    * (mesh.tensor - 1)
    / mesh.tensor,
  }
  return [
    Collective('all', (axis,), 1, size * parts)
    for axis, size in sizes.items()
    if getattr(mesh, axis) > 1
  ]


def moved_through_memory(cfg: ExperimentConfig, found: Shapes, topology: Topology) -> float:
  """Bytes through one device's memory in a step: optimiser, gradients, gathered weights, activations."""
  mesh, model = cfg.mesh, cfg.model
  itemsize, passes = itemsize_of(cfg), 3 if model.remat == 'none' else 4
  layers, tokens = model.num_layers + model.mtp_depth, tokens_per_device(cfg, mesh)
  moves = exchanged(cfg, mesh, topology)
  block = (
    moves.copies * (6 * model.d_model + 8 * model.moe.d_expert / mesh.tensor)
    + (moves.room * 4 + tokens * 20) * model.d_model
  )
  weights = 3 * found.count(mesh, 'fsdp')
  each = passes * itemsize * (layers * block + weights) + 16 * found.count(mesh)
  return cfg.micro_batches * each + 36 * found.count(mesh)
