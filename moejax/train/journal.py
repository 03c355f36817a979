"""What a run tells: a line a person reads, metrics.jsonl and TensorBoard for tools, a report at the end.

Every number of a line but the clock's belongs to that one step, so that a resumed run writes the lines that an
uninterrupted one would have written, bit for bit.
"""

import pathlib
import threading
import time
from types import TracebackType

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from moejax.data.pipeline import Data
from moejax.runtime.append_log import warn_once
from moejax.runtime.files import write_whole
from moejax.runtime.multiprocess import is_first_process
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import devices_at_work, mfu
from moejax.train.step.train_step import Metrics
from moejax.train.telemetry.collapse_alarms import Alarms, sounding
from moejax.train.telemetry.compression import gzip_bits_per_byte, xz_bits_per_byte
from moejax.train.telemetry.final_report import at_step, best_row, last_words, monitors, not_finite
from moejax.train.telemetry.load_plots import load_bars, load_image
from moejax.train.telemetry.metric_rows import (
  ValidationSums,
  progress_text,
  training_row,
  validation_row,
)
from moejax.train.telemetry.metrics_log import MetricsLog, as_json
from moejax.train.telemetry.routing_probe import Probes
from moejax.train.telemetry.tensorboard import TensorBoard


class Journal:
  """Opened for a run at the step it starts from; what an earlier process wrote after that step is cut away."""

  def __init__(self, cfg: ExperimentConfig, data: Data, flops_per_token: int, step: int) -> None:
    self.workdir = pathlib.Path(cfg.workdir)
    self.cfg, self.data, self.flops_per_token, self.skips_in_a_row = cfg, data, flops_per_token, 0
    self.metrics = MetricsLog(self.workdir / 'metrics.jsonl', step)
    self.validated = {row['step'] for row in self.metrics.rows() if 'eval/lm_loss' in row}
    self.loads = MetricsLog(self.workdir / 'load.jsonl', step)
    self.board = TensorBoard(self.workdir / 'tensorboard', step)
    self.probes = Probes(self.workdir / 'probes', step)
    self.console = Console(
      highlight=False, soft_wrap=True, force_jupyter=False
    )  # plain lines in a notebook, too
    self.bar = Progress(
      TextColumn('{task.description}'), console=self.console, disable=not self.console.is_terminal
    )
    self.task = self.bar.add_task('compiling', total=cfg.steps, completed=step)
    self.usage, self.text, self.alarms = '', '', Alarms(cfg.model.moe.router.top_k)
    self.compressed: dict[str, float] = {}
    self.resume_clock()

  def __enter__(self) -> 'Journal':
    self.bar.start()
    threading.Thread(target=self.compress, daemon=True).start()
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.bar.stop()
    for log in (self.metrics, self.loads, self.board):
      log.close()

  def say(self, *lines: str) -> None:
    """Lines for the person at the terminal, above the progress bar where there is one."""
    self.console.print(*lines, sep='\n', markup=False)

  def save_failed(self, step: int, why: str) -> None:
    """Tells of a save that did not reach the disk. saves_failed is a row of its own: no other has another number."""
    self.say(f'save of step {step} failed, {why}')
    self.metrics.write({'step': step, 'saves_failed': 1})
    self.board.scalars(step, {'saves_failed': 1})

  def compress(self) -> None:
    """What gzip and xz make of the held-out text: seconds of work that nothing waits for, and that hold up no exit."""
    training, text = self.data.train_text(), self.data.validation_text()
    self.compressed = {'gzip': gzip_bits_per_byte(training, text)}
    self.compressed['xz'] = xz_bits_per_byte(training, text)

  def resume_clock(self) -> None:
    """Tokens per second are counted from here on: validation and saving are not training."""
    self.since, self.tokens = time.perf_counter(), 0

  def step(self, step: int, metrics: Metrics) -> None:
    """Reads a step's metrics, waiting for it if need be; writes them where they are due."""
    self.skips_in_a_row = self.skips_in_a_row + 1 if metrics['skipped'] else 0
    if metrics['skipped']:
      self.say(
        f'step {step} skipped: loss {metrics["loss"]:.4g}, gradient norm {metrics["grad_norm"]:.4g} '
        f'({self.skips_in_a_row} in a row)'
      )
    self.tokens += self.cfg.batch_size * self.cfg.seq_len
    if step > 1 and step % self.cfg.log_every and step != self.cfg.steps:
      return
    metrics = jax.device_get(metrics)
    row, layers = training_row(metrics, self.data.bytes_per_token)
    row['tokens_per_second'] = self.tokens / (time.perf_counter() - self.since)
    seen = metrics['load'], metrics['layers']['dropped']
    row['alarms'] = sounding(*seen, self.cfg.model.moe.router.top_k)
    row['mfu'] = mfu(row['tokens_per_second'], self.flops_per_token, devices_at_work())
    self.metrics.write({'step': step} | row | {'layers': layers})
    self.loads.write({'step': step, 'load': metrics['load'].astype(int).tolist()})
    self.board.scalars(step, row)
    left = (
      (self.cfg.steps - step) * self.cfg.batch_size * self.cfg.seq_len / row['tokens_per_second']
    )
    for alarm in self.alarms.heard(step, *seen):
      self.say(alarm)
    line = progress_text(
      step, self.cfg.steps, row, left, self.console.width if self.console.is_terminal else 0
    )
    self.bar.update(self.task, completed=step, description=line)
    if not self.console.is_terminal:
      self.say(line)

  def validation(
    self, step: int, sums: ValidationSums, probe: np.ndarray, interference: Metrics, text: str
  ) -> float:
    """Writes what validation found, see `rows.added`, and keeps the probe; returns bits per byte of the text."""
    row, layers = validation_row(
      sums, self.cfg.model.moe.router.top_k, self.data, self.probes.record(step, probe)
    )
    row |= {f'interference/{name}': float(value) for name, value in interference.items()}
    if step not in self.validated:  # else a finished run, again
      self.metrics.write({'step': step} | row | {'eval/layers': layers})
    self.board.scalars(step, row)
    self.board.text('sample', text, step)
    self.images(step)
    self.text, self.usage = (
      text,
      (
        f'{100 * row["eval/expert_usage"]:.0f}% of experts used, MaxVio {row["eval/max_vio"]:.2f} (noise '
        f'{row["eval/noise_floor"]:.2f}), load '
        + ' '.join(f'[{load_bars(layer)}]' for layer in sums['load'])
      ),
    )
    others = ''.join(f', {name} {value:.3f}' for name, value in self.compressed.items())
    bpb, tokens = row['eval/bits_per_byte'], int(sums['task_tokens'].sum())
    self.say(
      f'step {step}: {bpb:.4f} bits per byte of held-out text ({tokens} tokens{others}); {self.usage}'
    )
    return bpb

  def images(self, step: int) -> None:
    """Each MoE layer's expert load over the steps so far, as pictures for TensorBoard."""
    history = np.array([row['load'] for row in self.loads.rows()])  # [steps logged, L, E]
    for layer in range(history.shape[1] if history.size else 0):
      self.board.image(f'expert_load/layer_{layer}', load_image(history[:, layer]), step)

  def report(self, digest: str, bpb: float) -> None:
    """The last words, also as report.json."""
    rows = self.metrics.rows()
    watched = monitors(last := at_step(rows, self.cfg.steps))
    report = {
      'bits_per_byte': bpb,
      'best_bits_per_byte': best_row(rows, bpb),
      'not_finite': not_finite(rows),
      'digest': digest,
      **self.compressed,
      **watched,
      'saturation': self.saturation(last),
    }
    with warn_once(self.workdir / 'report.json'):
      write_whole(self.workdir / 'report.json', as_json(report, indent=2) + '\n')
    self.say(
      *last_words(
        report,
        watched,
        self.compressed,
        self.usage,
        self.text,
        self.workdir,
        self.cfg.sample_prompt,
      )
    )

  def saturation(self, last: dict[str, object]) -> dict[str, float]:
    """Of each validation but the last, the share of its probe's copies that already went where they end; a mean."""
    layers = self.probes.saturation()
    if layers and 'eval/saturation' not in last:  # else a finished run, again
      self.metrics.write(
        {'step': self.cfg.steps, 'eval/saturation': {str(step): layers[step] for step in layers}}
      )
      for step, share in layers.items():
        self.board.scalars(
          step, {'eval/saturation': share.mean(), 'eval/saturation_worst': share.min()}
        )
    return {str(step): float(share.mean()) for step, share in layers.items()}


class NullJournal:
  """Decides as a Journal does, and writes nothing."""

  def __init__(self, cfg: ExperimentConfig, data: Data) -> None:
    self.cfg, self.data, self.skips_in_a_row = cfg, data, 0

  def __enter__(self) -> 'NullJournal':
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
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

  def validation(
    self, step: int, sums: ValidationSums, probe: np.ndarray, interference: Metrics, text: str
  ) -> float:
    """Bits per byte of the text, as a Journal finds them."""
    return validation_row(sums, self.cfg.model.moe.router.top_k, self.data, {}).scalars[
      'eval/bits_per_byte'
    ]

  def report(self, digest: str, bpb: float) -> None:
    """The first process says it."""


def open_journal(
  cfg: ExperimentConfig, data: Data, flops_per_token: int, step: int
) -> Journal | NullJournal:
  """The journal of this process: only the first one writes."""
  return Journal(cfg, data, flops_per_token, step) if is_first_process() else NullJournal(cfg, data)
