"""The directory of a run: its config, its tokenizer, and the model in its newest checkpoint.

Everything that reads a run from outside its training loop reads it here.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
from jax import Array
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from moejax.checkpoint.checkpoints import Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.stored_leaves import StoredLeaves
from moejax.config import (
  ConfigError,
  check,
  from_config_dict,
  local_path,
  problem_if,
  to_config_dict,
)
from moejax.data.special_tokens import (
  OWN,
  TOKENIZER_FILE,
  SpecialTokens,
  read_special_tokens,
)
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.model.transformer import Transformer
from moejax.moe.bias import BiasState
from moejax.runtime.files import inside, read_json, write_whole
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.initial_model import ModelAndRouter, model_and_router_shapes

R = TypeVar('R')
# What lies in a run directory.
CONFIG_FILE = 'config.json'
CHECKPOINTS = 'checkpoints'


class RunSetup(NamedTuple):
  """The config of a run and its tokenizer."""

  cfg: ExperimentConfig  # with the size of the vocabulary filled in
  tokenizer: Tokenizer | None  # None: there is none in the directory


class StoredModel(NamedTuple):
  """The model of a checkpoint, with the router bias that it was trained to."""

  step: int  # steps that it had been trained for
  model: Transformer
  router: BiasState  # [L, E] f32 each


class OpenedRun(NamedTuple):
  """A run that is ready to be sampled from, at its newest verified step."""

  cfg: ExperimentConfig
  tokenizer: Tokenizer | None
  step: int
  model: Transformer
  router_bias: Array  # [L, E] f32


def write_config(cfg: ExperimentConfig) -> None:
  """Writes the config into its run directory, for whoever reads the run later.

  The file appears whole or not at all, and a link in its place keeps its target.
  """
  workdir = Path(cfg.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(workdir / CONFIG_FILE, json.dumps(dataclasses.asdict(cfg), indent=2) + '\n')


def read_config(workdir: str) -> ExperimentConfig:
  """The config of an existing run, as it was written.

  Raises:
    ConfigError: there is none, or it does not fit this version.
  """
  fields = read_json(local_path('workdir', workdir), CONFIG_FILE)
  # A config.json of Hugging Face names its architecture so; ours has no such field.
  is_published = 'model_type' in fields
  import_command = f'python -m moejax.hf import {workdir} --out=DIR'
  check(
    problem_if(
      not fields, f'workdir={workdir!r} holds no {CONFIG_FILE}: name the directory of a run'
    ),
    problem_if(
      is_published,
      f'workdir={workdir!r} holds a published model: '
      f'import it with `{import_command}` and name DIR',
    ),
  )
  # A run may have been moved since it wrote its config: it lies where it is read.
  try:
    return from_config_dict(ExperimentConfig, fields | {'workdir': workdir})
  except ConfigError as error:
    is_name_unknown = any('is not' in problem for problem in error.problems)
    has_plugins = 'plugins' in fields and fields['plugins']
    if has_plugins or not is_name_unknown:
      raise
    hint = (
      f'{Path(workdir) / CONFIG_FILE} names no plugins: a loss or dispatcher of your own belongs '
      'into a module that `plugins` of the config names, as ("my_losses",)'
    )
    raise ConfigError(*error.problems, hint) from error


def config_from_run(directory: str, is_source: bool) -> ConfigDict:
  """The config that flags change, where the directory of a run stands in the place of a file.

  A run that was trained is named again: the same command resumes it. An import, and with
  `is_source` any run, is what a new run starts from, which has to name a workdir of its own.

  Raises:
    ConfigError: it is no run.
  """
  cfg = read_config(directory)
  config = to_config_dict(cfg)
  if is_source or not cfg.steps:
    config.init_from, config.workdir = directory, ''
    config.steps = cfg.steps or ExperimentConfig.steps
    tokenizer = Path(directory) / TOKENIZER_FILE
    if tokenizer.exists():  # the ids of the model, whatever text comes now
      config.data.tokenizer = str(tokenizer)
  return config


def read_tokenizer(directory: str | os.PathLike, vocab_size: int = 0) -> Tokenizer | None:
  """The tokenizer that lies in the directory of a run or of a published model; None without one.

  Raises:
    ConfigError: it has more tokens than `vocab_size`, that of the model beside it; 0: not compared.
  """
  path = inside(Path(directory), TOKENIZER_FILE)
  if not path.exists():
    return None
  tokenizer = load_tokenizer(str(path), special=read_special_tokens(directory))
  largest = tokenizer.vocab_size - 1
  problem = (
    f'{path}: expected ids below vocab_size={vocab_size} of config.json, found {largest}: '
    'is it the tokenizer of this model?'
  )
  check(problem_if(0 < vocab_size <= largest, problem))
  return tokenizer


def text_ends(workdir: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
  """The ids that end a text of the model in `workdir`, as its tokenizer or else its files say."""
  return tokenizer.ends if tokenizer else read_special_tokens(workdir).eos_ids


def has_begun(cfg: ExperimentConfig) -> bool:
  """Whether the run directory holds a checkpoint, good or bad, and init_from is not looked at."""
  return any((Path(cfg.workdir) / CHECKPOINTS).glob('[0-9]*'))


def starting_special_tokens(cfg: ExperimentConfig) -> SpecialTokens:
  """What is known of the model that a run goes on from: its own, or that of init_from."""
  directory = cfg.workdir if has_begun(cfg) else cfg.init_from
  return read_special_tokens(directory) if directory else OWN


def read_setup(workdir: str) -> RunSetup:
  """Config and tokenizer of a run.

  Raises:
    ConfigError: there is no config, or neither it nor a tokenizer tells the size of the vocabulary.
  """
  cfg, directory = read_config(workdir), local_path('workdir', workdir)
  tokenizer = read_tokenizer(directory)
  cfg = with_vocabulary(cfg, tokenizer.vocab_size if tokenizer else 0)
  path = directory / TOKENIZER_FILE
  missing = f'{path} is missing, and the config has model.vocab_size=0: put it back'
  check(problem_if(not cfg.model.vocab_size, missing))
  return RunSetup(cfg, tokenizer)


def read_model(
  workdir: str, cfg: ExperimentConfig, target: ModelAndRouter, keep_dtypes: bool = False
) -> StoredModel:
  """The model of the newest verified checkpoint of a run, on the shardings of `target`.

  keep_dtypes: whether what was imported in bfloat16 stays in it, as is enough for inference.

  Raises:
    ConfigError: that run's model has other shapes than `target`.
    NoLoadableCheckpoint: there is none, or none that verifies.
  """
  # Of the arrays of a TrainState only the model and the router are read.
  restored = checkpoints_of(workdir, cfg).restore(
    target._asdict(), {}, only=target._fields, keep_dtypes=keep_dtypes
  )
  if restored is None:
    raise no_checkpoint(workdir)
  step, state = restored[:2]
  return StoredModel(step, state['model'], state['router'])


def read_model_in_parts(
  workdir: str, cfg: ExperimentConfig, use: Callable[[int, StoredLeaves], R]
) -> R:
  """What `use` makes of the newest checkpoint's step and leaves, see `Checkpoints.read_in_parts`.

  Raises:
    ConfigError: that run's model has other shapes than its config makes.
    NoLoadableCheckpoint: there is none, or none that verifies.
  """
  shapes = model_and_router_shapes(cfg)._asdict()
  result = checkpoints_of(workdir, cfg).read_in_parts(shapes, use)
  if result is None:
    raise no_checkpoint(workdir)
  return result


def checkpoints_of(workdir: str, cfg: ExperimentConfig) -> Checkpoints:
  """The checkpoints of a run, for a reader."""
  directory = local_path('workdir', workdir) / CHECKPOINTS
  return Checkpoints(directory, cfg.checkpoint, readonly=True)


def no_checkpoint(workdir: str) -> NoLoadableCheckpoint:
  """The error of a run that has saved nothing."""
  return NoLoadableCheckpoint(f'workdir={workdir!r} has no checkpoint yet: train it first')


def read_model_on(device: jax.Device, workdir: str, cfg: ExperimentConfig) -> StoredModel:
  """The model of the newest verified checkpoint of a run, all of it on one device, as it lies.

  Raises:
    NoLoadableCheckpoint: there is none, or none that verifies.
  """
  home = SingleDeviceSharding(device)
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home),
    model_and_router_shapes(cfg),
  )
  return read_model(workdir, cfg, target, keep_dtypes=True)


def open_run(workdir: str) -> OpenedRun:
  """The newest verified step of a run, with what sampling from it needs.

  Raises:
    ConfigError: `workdir` is not the directory of a run.
    NoLoadableCheckpoint: it has no checkpoint that verifies.
  """
  cfg, tokenizer = read_setup(workdir)
  target = model_and_router_shapes(cfg)
  step, model, router = read_model(workdir, cfg, target, keep_dtypes=True)
  return OpenedRun(cfg, tokenizer, step, model, router.bias)
