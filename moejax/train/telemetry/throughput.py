"""How fast a run trains, and whether its devices wait for text."""

import time

from moejax.train.experiment.cost import devices_at_work, mfu


class Throughput:
  """Tokens a second since the clock was last resumed, and waits since the last row.

  Args:
    tokens_per_step: of a global batch.
    flops_per_token: see `cost.flops_per_token`.
  """

  def __init__(self, tokens_per_step: int, flops_per_token: int) -> None:
    self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
    self.waited = 0.0
    self.resume()

  def resume(self) -> None:
    """Counts from here on: validation and saving are not training."""
    self.since, self.tokens = time.perf_counter(), 0

  def count_step(self) -> None:
    """Counts a step that has ended."""
    self.tokens += self.tokens_per_step

  def add_wait(self, seconds: float) -> None:
    """Adds a time in which devices had nothing to do, for lack of a batch."""
    self.waited += seconds

  def row(self) -> dict[str, float]:
    """The metrics of a row.

    tokens_per_second, mfu: since the clock was resumed; mfu is 0 where a device's peak is unknown.
    input_wait: seconds since the last row that devices waited for a batch, at most.
    """
    rate = self.tokens / (time.perf_counter() - self.since)
    waited, self.waited = self.waited, 0.0
    utilisation = mfu(rate, self.flops_per_token, devices_at_work())
    return {'tokens_per_second': rate, 'mfu': utilisation, 'input_wait': waited}
