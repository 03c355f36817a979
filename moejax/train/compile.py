"""The compiled programs of a run, and where their arguments lie. Nothing is allocated, and no data
is read.

  config, mesh -> ShapeDtypeStructs with shardings -> compiled step
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from moejax.data.batch import Batch
from moejax.model.transformer import Transformer
from moejax.moe.bias import BiasState
from moejax.sharding.logical_axes import replicated
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, sharded_state_shapes
from moejax.train.step.gradient_interference import interference
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import Metrics, compile_step, eval_step
from moejax.train.telemetry.routing_probe import make_probe


class Programs(NamedTuple):
  """The compiled programs of a run, and where their arguments lie."""

  target: TrainState  # ShapeDtypeStructs with shardings
  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # donates the old state
  evaluate: Callable[[Transformer, BiasState, Batch], Metrics]
  interfere: Callable[[TrainState, Batch], Metrics]
  rows: tuple[int, ...]  # of a global batch, that this process reads
  put: Callable[[Batch], Batch]  # these rows, NumPy -> global batch on the devices
  temporaries: int  # bytes on one device while a step runs


def compile_programs(cfg: ExperimentConfig, mesh: Mesh) -> Programs:
  """Compiles the training step ahead of time, which also tells how much memory it will take.

  The other two programs are compiled when they are first called.
  """
  target, example = sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh)
  step = compile_step(cfg, target, example)
  sharding = example.task_ids.sharding
  return Programs(
    target=target,
    train=step,
    evaluate=jax.jit(functools.partial(evaluate_batch, cfg=cfg)),
    interfere=jax.jit(functools.partial(interference, cfg=cfg)),
    rows=rows_of_this_process(cfg.batch_size, sharding),
    put=functools.partial(jax.make_array_from_process_local_data, sharding),
    temporaries=step.memory_analysis().temp_size_in_bytes,
  )


def rows_of_this_process(batch_size: int, sharding: jax.sharding.Sharding) -> tuple[int, ...]:
  """The rows of a global batch that this process's devices hold, in order, each once."""
  rows: set[int] = set()
  # Devices that differ in another axis than the batch's hold the same rows.
  for (row_slice,) in sharding.addressable_devices_indices_map((batch_size,)).values():
    rows.update(range(*row_slice.indices(batch_size)))
  return tuple(sorted(rows))


def evaluate_batch(
  model: Transformer, router: BiasState, batch: Batch, cfg: ExperimentConfig
) -> Metrics:
  """What a validation asks of one batch: what `eval_step` gives, and a probe of its routing.

  All is replicated: the same on every device, and so in every process.
  """
  sums = eval_step(model, router, batch, cfg)
  num_experts = cfg.model.moe.router.num_experts
  probe = make_probe(sums.pop('expert_ids'), batch.segment_ids > 0, num_experts)
  return replicated(sums | {'probe': probe})
