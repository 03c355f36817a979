"""One experiment: the root of the config tree, and the checks that span its parts."""

import dataclasses
import os

from moejax.checkpoint.checkpoints import CheckpointConfig
from moejax.config import (
  INT32,
  LARGEST_SEED,
  at_least,
  at_most,
  check,
  not_finite,
  problem_if,
  url_problem,
  utf8_problem,
)
from moejax.data.sources import DataConfig
from moejax.model.config import ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.upcycle import UpcycleConfig
from moejax.moe.balance.config import BalanceConfig, router_problems
from moejax.moe.balance.fit import untrainable
from moejax.sharding.mesh import MeshConfig
from moejax.train.optimizer import OptimConfig

DEFAULT_CONFIG = 'tiny'  # the file of configs/ where a command line names none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When held-out text is read, and how much of it.

  every: steps between validations; 0: at the end only.
  batches: batches of the held-out text in a validation; 0: all of it.
  interference: whether the gradients of balance and LM losses are compared on the next training
    batch, too.
  sample_tokens: tokens of the sample that a validation draws, from `sample_prompt` on; 0: none is
    drawn, nor are programs compiled for it.
  """

  every: int = 100
  batches: int = 0
  interference: bool = False
  sample_tokens: int = 96

  def __post_init__(self) -> None:
    check(
      *at_least(0, self, 'every', 'batches'),
      *at_least(0, self, 'sample_tokens', meaning='no sample'),
    )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All that decides a run.

  steps: optimiser steps, over which every schedule is stretched; 0: a model that is only read here,
    as an imported one is, and may have a router that cannot be trained.
  seed: of initialisation and of the order of the data.
  batch_size: rows in a step, of seq_len tokens each, over all devices, in `micro_batches` equal
    parts.
  seq_len: tokens in a row.
  micro_batches: parts of a batch whose gradients are added up before a step, for memory.
  log_every: steps between two rows of the log; a validation has its own, see EvalConfig.
  stop_after: end here, with a checkpoint, what is planned for `steps`; 0: do not.
  stop_after_skips: steps in a row with a non-finite loss, gradient or update, each skipped, after
    which the run gives up.
  hang_after: seconds without progress, after which a process ends itself, with the stacks of its
    threads; 0: never.
  sample_prompt: what the model goes on from in the sample of each validation.
  init_from: directory of a run whose model and router bias this one starts from, with a fresh
    optimiser; '' for random numbers.
  workdir: where everything is written; the same one resumes. In this and init_from, ~ is the home
    directory.
  upcycle: how experts are made where init_from is a dense model, of one expert, and this one has
    others.
  plugins: modules that are imported before the config is checked, such as one that registers losses
    of your own; whoever reads the run imports them again.
  """

  steps: int = 500
  seed: int = 0
  batch_size: int = 16
  seq_len: int = 256
  micro_batches: int = 1
  log_every: int = 10
  stop_after: int = 0
  stop_after_skips: int = 10
  hang_after: float = 1800.0
  sample_prompt: str = 'def '
  init_from: str = ''
  workdir: str = 'runs/default'
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  balance: BalanceConfig = BalanceConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  upcycle: UpcycleConfig = UpcycleConfig()
  plugins: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    check(*not_finite(self))
    # A shell leaves the ~ of --workdir=~/run as it is.
    for field in ('workdir', 'init_from'):
      object.__setattr__(self, field, os.path.expanduser(getattr(self, field)))
    # Each part has checked itself when it was made; here is what stands alone or spans two of them.
    # Whether a mesh divides the batch is found where it is made: devices are not known here.
    check(
      *at_least(0, self, 'steps', meaning='a model that is not trained'),
      *at_least(1, self, 'batch_size', 'seq_len'),
      *at_least(1, self, 'micro_batches', 'log_every', 'stop_after_skips'),
      *at_least(0, self, 'seed', 'stop_after', 'hang_after'),
      *at_most(LARGEST_SEED, self, 'seed'),
      utf8_problem('sample_prompt', self.sample_prompt),
      problem_if(not self.workdir, "workdir='': name a directory for the run"),
      *self._urls(),
      self._uneven_micro_batches(),
      self._too_many_copies(),
      self.balance.groups_problem(self.batch_size, self.micro_batches),
      *self._unknown_tasks(),
      problem_if(
        self.upcycle.drop and not self.init_from,
        f'upcycle.drop={self.upcycle.drop} is for a dense model: name one with init_from, or use 0',
      ),
      *router_problems(self.balance, self.model.moe.router, self.micro_batches),
      problem_if(self.steps, untrainable(self.model.moe.router)),
    )

  def _urls(self) -> list[str]:
    paths = {'workdir': self.workdir, 'init_from': self.init_from}
    paths |= {
      f'data.{name}': getattr(self.data, name) for name in ('path', 'cache_dir', 'tokenizer')
    }
    return [url_problem(name, path) for name, path in paths.items()]

  def _uneven_micro_batches(self) -> str:
    # Micro-batches below 1 are a problem of their own, and nothing can be divided by them.
    return problem_if(
      self.micro_batches > 0 and self.batch_size % self.micro_batches,
      f'micro_batches={self.micro_batches} does not divide batch_size={self.batch_size}: '
      'use a divisor of it',
    )

  def _too_many_copies(self) -> str:
    top_k = self.model.moe.router.top_k
    copies = self.batch_size * self.seq_len * top_k
    return problem_if(
      copies > INT32,
      f'batch_size={self.batch_size} * seq_len={self.seq_len} * top_k={top_k} = {copies} copies of '
      f'tokens in a step: use {INT32} at most, which is as far as int32 counts them',
    )

  def _unknown_tasks(self) -> list[str]:
    known = self.data.tasks
    return [
      f'loss.task_weights.{task} is not a task of data: use one of {list(known)}'
      for task in self.loss.task_weights
      if task not in known
    ]


def with_vocabulary(cfg: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
  """The config with the tokenizer's vocabulary in the model's, where that is 0.

  Raises:
    ConfigError: the tokenizer has more tokens than the model; ids past the last are clamped without
      a word by XLA.
  """
  model = cfg.model
  check(
    problem_if(
      0 < model.vocab_size < vocab_size,
      f'config.model.vocab_size={model.vocab_size} is less than the {vocab_size} tokens of '
      f'data.tokenizer={cfg.data.tokenizer!r}: use 0 or {vocab_size}',
    )
  )
  model = dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)
  return dataclasses.replace(cfg, model=model)
