"""An estimate of what a training step sends and moves through memory, without compiling it.

It stands in for plan/hlo, which reads both from a compiled program. The factors that have no
comment of their own are assumed counts of the reads and writes of an array.

Letters: T tokens of one device in one micro-batch, D model, F FFN hidden.
"""

from typing import NamedTuple

from moejax.plan.hlo.collectives import Collective
from moejax.plan.memory_model import (
  FLOAT32_BYTES,
  ModelShapes,
  exchange_sizes,
  itemsize_of,
  saved_activation_bytes,
  tokens_per_device,
)
from moejax.plan.topology import Topology
from moejax.train.experiment.config import ExperimentConfig

ALL_REDUCE_SENDS = 2  # times (n - 1)/n of an array: a reduce-scatter and an all-gather, in a ring
TENSOR_SUMS = 2  # a layer: after attention, and after the FFN

# Reads and writes in one pass of a block, of numbers.
COPY_WIDE_ACCESSES = 6  # [copies, D]
COPY_HIDDEN_ACCESSES = 8  # [copies, F], and of a layer without experts [T, F]
ROOM_ACCESSES = 4  # [room, D]
TOKEN_ACCESSES = 20  # [T, D]
WEIGHT_ACCESSES = 3  # the weights, gathered over fsdp
KEPT_ACCESSES = 4  # written, laid into the stack of all layers, and taken from it for the backward
# Bytes for each parameter of a device, in float32 numbers.
MICRO_BATCH_BYTES = 4 * FLOAT32_BYTES  # gradients of one micro-batch, and their sum
OPTIMIZER_BYTES = 9 * FLOAT32_BYTES  # gradients, parameters and both moments, once a step


class RunAgain(NamedTuple):
  """What parts of a block's forward pass a remat policy runs again, of 1."""

  tokens: float  # of what is done with [T, D]: attention is half of it
  ffn: float  # of the accesses of experts: gate and up make a quarter of them, and down is not run
  tensor_sums: int  # sums over `tensor`: attention's output, that the FFN reads


RUN_AGAIN = {
  'none': RunAgain(0, 0, 0),
  'all_but_attention': RunAgain(1 / 2, 0, 0),
  'experts': RunAgain(1, 0, 1),
  'dots': RunAgain(1, 1 / 4, 0),
  'attention': RunAgain(1, 1 / 4, 1),
  'full': RunAgain(1, 1 / 4, 1),
}


def estimated_collectives(
  cfg: ExperimentConfig, shapes: ModelShapes, topology: Topology
) -> list[Collective]:
  """Returns the collectives of a step as a guess, one for each mesh axis of more than one device.

  Weights are gathered and gradients scattered over fsdp, gradients summed over data, tokens
  exchanged over expert, and activations summed over tensor.
  """
  mesh, model = cfg.mesh, cfg.model
  itemsize, layers = itemsize_of(cfg), model.num_layers + model.mtp_depth
  fsdp_passes, exchange_passes = 3, 5 / 2
  if model.remat == 'none':
    fsdp_passes = exchange_passes = 2
  own, gathered = shapes.count(mesh), shapes.count(mesh, 'fsdp')
  activations = tokens_per_device(cfg, mesh) * model.d_model * itemsize
  tensor_sums = layers * (2 * TENSOR_SUMS + RUN_AGAIN[model.remat].tensor_sums)
  sizes = {
    # Weights are gathered for the forward pass, and unless everything is kept once more for what is
    # run again and the backward pass together; the gradients are scattered once.
    'fsdp': (gathered - own) * itemsize * fsdp_passes,
    'data': ALL_REDUCE_SENDS * own * FLOAT32_BYTES * (mesh.data - 1) / mesh.data,
    # Backwards cotangents take the same ways. What is run again brings tokens to their experts.
    'expert': exchange_sizes(cfg, mesh, topology).sent * model.num_moe_layers * exchange_passes,
    'tensor': ALL_REDUCE_SENDS * activations * tensor_sums * (mesh.tensor - 1) / mesh.tensor,
  }
  return [
    Collective('all', (axis,), 1, size * cfg.micro_batches)
    for axis, size in sizes.items()
    if getattr(mesh, axis) > 1
  ]


def memory_traffic(cfg: ExperimentConfig, shapes: ModelShapes, topology: Topology) -> float:
  """Returns the bytes that go through the memory of one device in a step, as a guess.

  They are those of the optimiser, the gradients, the gathered weights and the activations.
  """
  mesh, model = cfg.mesh, cfg.model
  # A backward pass counts as two forward passes.
  again = RUN_AGAIN[model.remat]
  layers, tokens = model.num_layers + model.mtp_depth, tokens_per_device(cfg, mesh)
  exchange, moe_layers = exchange_sizes(cfg, mesh, topology), model.num_moe_layers
  hidden = COPY_HIDDEN_ACCESSES * model.moe.d_expert / mesh.tensor
  copies = exchange.copies * (COPY_WIDE_ACCESSES * model.d_model + hidden)
  experts = moe_layers * (copies + exchange.room * ROOM_ACCESSES * model.d_model)
  dense = (layers - moe_layers) * tokens * COPY_HIDDEN_ACCESSES * model.d_ff / mesh.tensor
  blocks = layers * tokens * TOKEN_ACCESSES * model.d_model
  weights = WEIGHT_ACCESSES * shapes.count(mesh, 'fsdp')
  own = shapes.count(mesh)
  accesses = (3 + again.tokens) * blocks + (3 + again.ffn) * (experts + dense + weights)
  kept = KEPT_ACCESSES * saved_activation_bytes(cfg, exchange, topology)
  micro_batch = itemsize_of(cfg) * accesses + kept + MICRO_BATCH_BYTES * own
  return cfg.micro_batches * micro_batch + OPTIMIZER_BYTES * own
