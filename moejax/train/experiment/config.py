"""One experiment: the root of the config tree, the checks that span its parts, and its file in a run directory."""

import dataclasses

from moejax.checkpoint.checkpoints import CheckpointConfig
from moejax.config import check
from moejax.data.sources import DataConfig
from moejax.model.config import ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.upcycle import UpcycleConfig
from moejax.moe.balance.config import BalanceConfig, router_problems
from moejax.sharding.mesh import MeshConfig
from moejax.train.optimizer import OptimConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Validation `every` so many steps, 0: at the end only, on `batches` batches of the held-out text, 0: all of it;
  and, if asked for, the `interference` of balance and LM gradients on the next training batch."""

  every: int = 100
  batches: int = 0
  interference: bool = False

  def __post_init__(self) -> None:
    check(
      *(
        f'{name}={value}: use 0 or more'
        for name, value in (('every', self.every), ('batches', self.batches))
        if value < 0
      )
    )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All that decides a run.

  batch_size: rows in a step, of seq_len tokens each, over all devices, in `micro_batches` equal parts.
  stop_after: end here, with a checkpoint, what is planned for `steps`; 0: do not.
  seed: of initialisation and of the order of the data.
  stop_after_skips: steps in a row with a non-finite loss or gradient, each skipped, after which the run gives up.
  hang_after: seconds without progress, after which a process ends itself, with the stacks of its threads; 0: never.
  workdir: where everything is written; the same one resumes.  init_from: directory of a run whose
    model and router bias this one starts from, with a fresh optimiser; '' for random numbers.
  upcycle: how experts are made where that is a dense model, of one expert, and this one has others.
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

  def __post_init__(self) -> None:
    positive = ('steps', 'batch_size', 'seq_len', 'micro_batches', 'log_every', 'stop_after_skips')
    check(
      *(
        f'{name}={getattr(self, name)}: use 1 or more'
        for name in positive
        if getattr(self, name) < 1
      ),
      *(
        f'{n}={getattr(self, n)}: use 0 or more'
        for n in ('seed', 'stop_after', 'hang_after')
        if getattr(self, n) < 0
      ),
      "workdir='': name a directory for the run" if not self.workdir else '',
      f'micro_batches={self.micro_batches} does not divide batch_size={self.batch_size}: use a divisor of it'
      if self.micro_batches > 0 and self.batch_size % self.micro_batches
      else '',
      self.balance.groups_problem(self.batch_size, self.micro_batches),
      *(
        f'loss.task_weights.{task} is not a task of data: use one of {list(self.data.tasks)}'
        for task in self.loss.task_weights
        if task not in self.data.tasks
      ),
      f'upcycle.drop={self.upcycle.drop} is for a dense model: name one with init_from, or use 0'
      if self.upcycle.drop and not self.init_from
      else '',
      *router_problems(self.balance, self.model.moe.router, self.micro_batches),
    )


def with_vocabulary(cfg: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
  """The config with the tokenizer's vocabulary in the model's, where that is 0.

  Raises:
    ConfigError: the tokenizer has more tokens than the model; ids past the last are clamped without a word by XLA.
  """
  model = cfg.model
  check(
    f'config.model.vocab_size={model.vocab_size} is less than the {vocab_size} tokens of '
    f'data.tokenizer={cfg.data.tokenizer!r}: use 0 or {vocab_size}'
    if 0 < model.vocab_size < vocab_size
    else ''
  )
  return dataclasses.replace(
    cfg, model=dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)
  )
