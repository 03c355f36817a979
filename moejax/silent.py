"""What has the journal's place where nothing is to be written: in every process of a run but the first."""

from types import TracebackType

import numpy as np

from moejax.data import Data
from moejax.experiment import ExperimentConfig
from moejax.rows import Sums, validation_row
from moejax.step import Metrics


class Silent:
  """Decides as a Journal does, and writes nothing."""

  def __init__(self, cfg: ExperimentConfig, data: Data) -> None:
    self.cfg, self.data, self.skips_in_a_row = cfg, data, 0

  def __enter__(self) -> 'Silent':
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    """Nothing is open."""

  def say(self, *lines: str) -> None:
    """The first process says it."""

  def save_failed(self, step: int, why: str) -> None:
    """The first process says it."""

  def resume_clock(self) -> None:
    """There is none."""

  def step(self, step: int, metrics: Metrics) -> None:
    """Waits for a step, as a Journal does, so that no process runs ahead."""
    self.skips_in_a_row = self.skips_in_a_row + 1 if metrics['skipped'] else 0

  def validation(self, step: int, sums: Sums, probe: np.ndarray, interference: Metrics, text: str) -> float:
    """Bits per byte of the text, as a Journal finds them."""
    return validation_row(sums, self.cfg.model.moe.router.top_k, self.data, {}).scalars['eval/bits_per_byte']

  def report(self, digest: str, bpb: float) -> None:
    """The first process says it."""
