"""All that a run carries from step to step.

Letters: E experts, L MoE layers.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import optax

from moejax.experiment import ExperimentConfig
from moejax.moe.balance import spans_micro_batches
from moejax.moe.bias import BiasState, init_state as init_bias
from moejax.moe.sets import parts_of_set
from moejax.optim import optimizer
from moejax.stability import Stability, init as init_stability
from moejax.transformer import Transformer


class TrainState(NamedTuple):
  """All that a run carries from step to step."""

  step: Array                 # scalar i32, steps taken, skipped ones included
  model: Transformer
  opt_state: optax.OptState
  router: BiasState           # [L, E] f32 each: no parameter, no gradient, moved once a step
  lagged: dict[str, Array]    # loss -> [sets, L, E] f32, the step before's counts; only for accumulation='lagged'
  stability: Stability


def build_model(key: Array, cfg: ExperimentConfig) -> Transformer:
  """A freshly initialised model that computes the balance losses of the config."""
  return Transformer(key, cfg.model, cfg.balance.scopes(cfg.batch_size, cfg.micro_batches), cfg.balance.bias_rule)


def init_state(cfg: ExperimentConfig) -> TrainState:
  """The state before the first step; every number follows from cfg.seed."""
  model = build_model(jax.random.key(cfg.seed), cfg)
  layers, experts = cfg.model.num_moe_layers, cfg.model.moe.router.num_experts
  router = jax.tree.map(lambda a: jnp.stack([a] * layers), init_bias(experts))
  lagged = {name: jnp.zeros((cfg.micro_batches // parts, layers, experts))
            for name, parts in spanning(cfg).items() if cfg.balance.accumulation == 'lagged'}
  return TrainState(jnp.zeros((), jnp.int32), model, optimizer(cfg.optim, cfg.steps).init(model), router, lagged,
                    init_stability())


@functools.lru_cache(maxsize=2)
def shapes_of(cfg: ExperimentConfig) -> TrainState:
  """ShapeDtypeStructs of `init_state`. Kept: the mesh is held against them, and then the step is compiled for them."""
  return jax.eval_shape(functools.partial(init_state, cfg))


def spanning(cfg: ExperimentConfig) -> dict[str, int]:
  """The losses whose sets are larger than a micro-batch -> how many micro-batches one set is spread over."""
  micro_rows = cfg.batch_size // cfg.micro_batches
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  return {name: parts_of_set(scopes[name].rows, micro_rows) for name in spans_micro_batches(scopes, micro_rows)}
