"""How a run begins: from random numbers, with another run's model, or with experts made of a dense
run's FFN.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.checkpoint.fingerprint import accepted_names
from moejax.config import ConfigError, check
from moejax.data.tokenizer import Tokenizer
from moejax.model.config import ModelConfig
from moejax.model.field_roles import fields_with_role
from moejax.model.upcycle import not_dense, outcome, upcycle, upcycle_problems
from moejax.sharding.tree import kinds
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.initial_model import ModelAndRouter
from moejax.train.experiment.run_dir import TOKENIZER_FILE, RunSetup, read_model, read_setup
from moejax.train.shapes import sharded_state_shapes
from moejax.train.step.train_state import TrainState, init_state

Tree = TypeVar('Tree')
log = logging.getLogger(__name__)


def initial_train_state(cfg: ExperimentConfig, target: TrainState, mesh: Mesh) -> TrainState:
  """A fresh state on the target's shardings, with the model of `init_from` where that is given.

  Raises:
    ConfigError: that model has other shapes, and is not a dense one whose FFN could become this
      one's experts.
    NoLoadableCheckpoint: it has no checkpoint that verifies.
  """
  state = quick_jit(functools.partial(init_state, cfg), target)()
  if not cfg.init_from:
    return state
  source = read_starting_run(cfg.init_from).cfg
  source_shapes = sharded_state_shapes(source, mesh)
  changed = differences(cfg.model, source.model)
  # The same arrays: how the fields differ is told, and is no reason to refuse.
  if kinds(source_shapes.model) == kinds(target.model):
    _, model, router = read_model(cfg.init_from, cfg, ModelAndRouter(target.model, target.router))
    log.info('the model of %s%s', cfg.init_from, ''.join(f'; {line}' for line in changed))
    return state._replace(model=model, router=router)
  try:
    check(*not_dense(source.model))
    check(*upcycle_problems(source.model, cfg.model))
  except ConfigError as error:
    raise ConfigError(
      'init_from: neither the same model nor one that experts can be made of',
      *error.problems,
      *changed,
    ) from error
  # Read on the mesh of this run: the dense model need not fit on one device.
  dense = ModelAndRouter(source_shapes.model, source_shapes.router)
  _, model, _ = read_model(cfg.init_from, source, jax.tree.map(replicate_unit_axes, dense))
  about = outcome(source.model, cfg.model, cfg.upcycle)
  log.info('the model of %s, upcycled: %s', cfg.init_from, about)
  # The key of a step that is never taken: steps are counted from 0.
  key = jax.random.fold_in(jax.random.key(cfg.seed), cfg.steps)
  make_experts = quick_jit(upcycle, target.model, static_argnums=2)
  return state._replace(model=make_experts(model, state.model, cfg.upcycle, key))


def quick_jit(
  function: Callable[..., Tree], target: Tree, static_argnums: int | None = None
) -> Callable[..., Tree]:
  """The function compiled with little optimisation, its result on the shardings of `target`.

  XLA has nothing to win in what runs once, and takes a second to see it.
  """
  return jax.jit(
    function,
    static_argnums=static_argnums,
    out_shardings=jax.tree.map(lambda a: a.sharding, target),
    compiler_options={'xla_backend_optimization_level': 1},
  )


def expect_same_tokenizer(cfg: ExperimentConfig, tokenizer: Tokenizer) -> None:
  """Compares the tokenizer of a run with that of init_from: to another one, all ids are noise.

  Raises:
    ConfigError: they differ, and checkpoint.accept does not say that they may.
  """
  source = read_starting_run(cfg.init_from)
  if source.tokenizer is None:
    log.warning('init_from holds no tokenizer: its ids are taken for those of %s', tokenizer.name)
    return
  if source.tokenizer.digest == tokenizer.digest:
    return
  there = f'{source.cfg.data.tokenizer} ({source.tokenizer.digest})'
  here = f'{tokenizer.name} ({tokenizer.digest})'
  difference = f'data.tokenizer: {there} in init_from, {here} in the config'
  if 'tokenizer' in accepted_names(cfg.checkpoint.accept):
    log.warning('accepted: %s', difference)
    return
  theirs = Path(cfg.init_from) / TOKENIZER_FILE
  raise ConfigError(
    f'init_from: its model reads the ids of another tokenizer; take that one with '
    f'--config.data.tokenizer={theirs}, or give --config.checkpoint.accept=tokenizer to go on all '
    'the same',
    difference,
  )


def read_starting_run(directory: str) -> RunSetup:
  """Config and tokenizer of the run in `directory`; problems are prefixed with init_from."""
  try:
    return read_setup(directory)
  except ConfigError as error:
    raise ConfigError(*(f'init_from: {problem}' for problem in error.problems)) from error


def replicate_unit_axes(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The same shape with its axes of size 1 on every device.

  The one expert of a dense model is no stack that an `expert` axis could split.
  """
  axes = []
  for size, axis in itertools.zip_longest(leaf.shape, leaf.sharding.spec):
    axes.append(None if size == 1 else axis)
  sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*axes))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def model_fingerprint(model: ModelConfig) -> dict[str, str]:
  """What a model computes, and in which dtype, for the fingerprint of its checkpoints."""
  fields = fields_with_role(model, 'function', 'training', 'precision')
  return {f'model.{path}': repr(value) for path, value in fields.items()}


def differences(here: ModelConfig, there: ModelConfig) -> list[str]:
  """A line for each field of two configs that differs and decides what a model computes."""
  ours = fields_with_role(here, 'function', 'training')
  theirs = fields_with_role(there, 'function', 'training')
  return [
    f'model.{path}={value!r} here, {theirs[path]!r} there'
    for path, value in ours.items()
    if value != theirs[path]
  ]
