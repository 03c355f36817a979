"""The compiled programs of a run, and where their arguments lie. Nothing is allocated, and no data is read.

  config, mesh -> ShapeDtypeStructs with shardings -> compiled step
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax.data import Batch
from moejax.experiment import ExperimentConfig
from moejax.interference import interference
from moejax.moe.bias import BiasState
from moejax.sharding import spec
from moejax.start import target_of
from moejax.state import TrainState
from moejax.step import Metrics, compile_step, eval_step
from moejax.transformer import Transformer


class Programs(NamedTuple):
  """The compiled programs of a run, and where their arguments lie."""

  target: TrainState                                            # ShapeDtypeStructs with shardings
  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  evaluate: Callable[[Transformer, BiasState, Batch], Metrics]
  interfere: Callable[[TrainState, Batch], Metrics]
  put: Callable[[Batch], Batch]                                 # NumPy -> device
  temporaries: int                                              # bytes on one device while a step runs


def compile_programs(cfg: ExperimentConfig, mesh: Mesh) -> Programs:
  """Compiles the training step ahead of the first batch, which also tells how much memory it will take."""
  target, example = target_of(cfg, mesh), batch_of(cfg, mesh)

  def put(batch: Batch) -> Batch:
    return jax.device_put(batch, example.tokens.sharding)

  step = compile_step(cfg, target, example)
  evaluate = jax.jit(functools.partial(eval_step, cfg=cfg))
  meter = jax.jit(functools.partial(interference, cfg=cfg))
  return Programs(target, step, evaluate, meter, put, step.memory_analysis().temp_size_in_bytes)


def batch_of(cfg: ExperimentConfig, mesh: Mesh) -> Batch:
  """ShapeDtypeStructs of a global batch, its rows split over the mesh."""
  rows = NamedSharding(mesh, spec('batch'))

  def shape(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((cfg.batch_size, *sizes), dtype, sharding=rows)

  numbers, flags = shape(jnp.int32, cfg.seq_len), shape(jnp.bool_, cfg.seq_len)
  return Batch(tokens=numbers, targets=numbers, mask=flags, segment_ids=numbers, positions=numbers,
               task_ids=shape(jnp.int32))
