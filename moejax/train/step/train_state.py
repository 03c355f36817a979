"""The state of a training run: everything that one step hands to the next, and a checkpoint holds.

Letters: E experts, L MoE layers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from moejax.model.transformer import Transformer
from moejax.moe.balance.losses import spans_micro_batches
from moejax.moe.bias import BiasState
from moejax.moe.token_sets import parts_of_set
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.initial_model import build_model_and_router
from moejax.train.optimizer import optimizer
from moejax.train.step.spikes import Stability, init_stability


class TrainState(NamedTuple):
  """All that a run carries from step to step. Field names are paths in checkpoints."""

  step: Array  # scalar i32, steps taken, skipped ones included
  model: Transformer
  opt_state: optax.OptState
  router: BiasState  # [L, E] f32 each: no parameter, no gradient, moved once a step
  # loss -> [sets, L, E] i32, the step before's counts; empty unless accumulation='lagged'.
  lagged: dict[str, Array]
  stability: Stability


def init_state(cfg: ExperimentConfig) -> TrainState:
  """The state before the first step; every number follows from cfg.seed."""
  model, router = build_model_and_router(cfg)
  # Zeros: the first step has no step before it, and balance losses then pull nowhere.
  lagged = {}
  if cfg.balance.accumulation == 'lagged':
    layers, experts = cfg.model.num_moe_layers, cfg.model.moe.router.num_experts
    for name, parts in spanning(cfg).items():
      lagged[name] = jnp.zeros((cfg.micro_batches // parts, layers, experts), jnp.int32)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    model=model,
    opt_state=optimizer(cfg.optim, cfg.steps).init(model),
    router=router,
    lagged=lagged,
    stability=init_stability(),
  )


def spanning(cfg: ExperimentConfig) -> dict[str, int]:
  """The losses whose sets are larger than a micro-batch, and of how many micro-batches one set is.

  Empty where every set lies within a micro-batch, as with micro_batches=1.
  """
  micro_rows = cfg.batch_size // cfg.micro_batches
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  return {
    name: parts_of_set(scopes[name].rows, micro_rows)
    for name in spans_micro_batches(scopes, micro_rows)
  }
