"""The compiled programs of a run, and where their arguments lie. Nothing is allocated, and no data is read.

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
from moejax.train.telemetry.routing_probe import compact


class Programs(NamedTuple):
  """The compiled programs of a run, and where their arguments lie."""

  target: TrainState  # ShapeDtypeStructs with shardings
  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  evaluate: Callable[[Transformer, BiasState, Batch], Metrics]
  interfere: Callable[[TrainState, Batch], Metrics]
  rows: tuple[int, ...]  # of a global batch, that this process reads
  put: Callable[[Batch], Batch]  # these rows, NumPy -> global batch on the devices
  temporaries: int  # bytes on one device while a step runs


def compile_programs(cfg: ExperimentConfig, mesh: Mesh) -> Programs:
  """Compiles the training step ahead of the first batch, which also tells how much memory it will take."""
  target, example = sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh)
  where = example.task_ids.sharding
  cuts = where.addressable_devices_indices_map((cfg.batch_size,)).values()
  rows = sorted({row for (cut,) in cuts for row in range(*cut.indices(cfg.batch_size))})
  step = compile_step(cfg, target, example)
  evaluate = jax.jit(functools.partial(evaluate_batch, cfg=cfg))
  meter = jax.jit(functools.partial(interference, cfg=cfg))
  put = functools.partial(jax.make_array_from_process_local_data, where)
  return Programs(
    target, step, evaluate, meter, tuple(rows), put, step.memory_analysis().temp_size_in_bytes
  )


def evaluate_batch(
  model: Transformer, router: BiasState, batch: Batch, cfg: ExperimentConfig
) -> Metrics:
  """What a validation asks of one batch, the same on every device: sums as `eval_step` gives them, and a probe."""
  sums = eval_step(model, router, batch, cfg)
  probe = compact(sums.pop('expert_ids'), batch.segment_ids > 0, cfg.model.moe.router.num_experts)
  return replicated(sums | {'probe': probe})
