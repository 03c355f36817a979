"""The parts of a run that its loop works with."""

from typing import NamedTuple

from moejax.checkpoint.checkpoints import Checkpoints
from moejax.data.pipeline import Data
from moejax.train.compile import Programs
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.journal import Journal, NullJournal


class Run(NamedTuple):
  """Everything of a run but its state, which each step replaces."""

  cfg: ExperimentConfig  # with the size of the vocabulary
  data: Data
  programs: Programs
  checkpoints: Checkpoints
  journal: Journal | NullJournal
