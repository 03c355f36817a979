"""The model and the router state of an experiment before its first step.

Letters: E experts, L MoE layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model.transformer import Transformer
from moejax.moe.bias import BiasState, init_bias_state
from moejax.train.experiment.config import ExperimentConfig


class ModelAndRouter(NamedTuple):
  """The part of a run that computes: all that sampling, exporting and another run need of it.

  Field names are the first parts of their paths in a checkpoint.
  """

  model: Transformer
  router: BiasState  # [L, E] f32 each


def build_model(key: Array, cfg: ExperimentConfig) -> Transformer:
  """A freshly initialised model that computes the balance losses of the config.

  The scopes of its losses are those of the config's batch: how many rows a set of tokens has, and
  how many of them a micro-batch holds.
  """
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  return Transformer(key, cfg.model, scopes, cfg.balance.bias_rule)


def build_router_state(cfg: ExperimentConfig) -> BiasState:
  """The state of every MoE layer's bias rule before the first step, stacked. [L, E] f32 each."""
  # Stacked as the layers are, which a scan runs through.
  one_layer = init_bias_state(cfg.model.moe.router.num_experts)
  return jax.tree.map(lambda leaf: jnp.stack([leaf] * cfg.model.num_moe_layers), one_layer)


def build_model_and_router(cfg: ExperimentConfig) -> ModelAndRouter:
  """The model and the router state before the first step; every number follows from cfg.seed."""
  return ModelAndRouter(build_model(jax.random.key(cfg.seed), cfg), build_router_state(cfg))


def model_and_router_shapes(cfg: ExperimentConfig) -> ModelAndRouter:
  """ShapeDtypeStructs of model and router state, without shardings. Nothing is allocated."""
  return jax.eval_shape(functools.partial(build_model_and_router, cfg))
