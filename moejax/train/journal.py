"""What a run tells: a line a person reads, metrics.jsonl and TensorBoard for tools, a last report.

Every number of a line but the clock's belongs to that one step, so that a resumed run writes the
lines that an uninterrupted one would have written, bit for bit.

Letters: E experts, K experts per token, L MoE layers, T tokens of the probe.
"""

import pathlib
import threading
from collections.abc import Mapping
from types import TracebackType

import jax
import numpy as np
from rich.progress import Progress, TextColumn

from moejax.data.pipeline import Data
from moejax.data.token_cache import cache_directory
from moejax.runtime.append_log import warn_once
from moejax.runtime.files import write_whole
from moejax.runtime.multiprocess import is_first_process
from moejax.runtime.terminal import plain_console
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.train_step import Metrics
from moejax.train.telemetry.collapse_alarms import Alarms, count_alarms
from moejax.train.telemetry.compression import compress_held_out
from moejax.train.telemetry.final_report import (
  best_bits_per_byte,
  monitors,
  non_finite_validations,
  report_lines,
  row_of_step,
)
from moejax.train.telemetry.held_out_report import compare_sides, comparison_lines, tail_start
from moejax.train.telemetry.load_plots import load_bars, load_image
from moejax.train.telemetry.metric_rows import (
  ValidationSums,
  loss_row,
  progress_text,
  training_row,
  validation_row,
)
from moejax.train.telemetry.metrics_log import MetricsLog, as_json
from moejax.train.telemetry.routing_probe import Probes
from moejax.train.telemetry.tensorboard import TensorBoard
from moejax.train.telemetry.throughput import Throughput


class Journal:
  """The journal of a run from the step it starts at, written by the first process.

  What an earlier process wrote after that step is cut away.
  """

  def __init__(self, cfg: ExperimentConfig, data: Data, flops_per_token: int, step: int) -> None:
    self.cfg, self.data = cfg, data
    self.throughput = Throughput(cfg.batch_size * cfg.seq_len, flops_per_token)
    self.workdir = pathlib.Path(cfg.workdir)
    self.skips_in_a_row = 0
    self.metrics = MetricsLog(self.workdir / 'metrics.jsonl', step)
    self.validated = {row['step'] for row in self.metrics.rows() if 'eval/lm_loss' in row}
    self.loads = MetricsLog(self.workdir / 'load.jsonl', step)
    self.board = TensorBoard(self.workdir / 'tensorboard', step)
    self.probes = Probes(self.workdir / 'probes', step)
    self.console = plain_console()
    # The live line, below all others; it goes when the run ends.
    self.bar = Progress(
      TextColumn('{task.description}'),
      console=self.console,
      disable=not self.console.is_terminal,
      transient=True,
    )
    self.task = self.bar.add_task('first step', total=cfg.steps, completed=step)
    self.alarms = Alarms(cfg.model.moe.router.top_k)
    # Of the newest validation, for the report.
    self.usage, self.text = '', ''
    # Compressor -> bits per byte, filled by a thread of its own.
    self.compressed: dict[str, float] = {}

  def __enter__(self) -> 'Journal':
    self.bar.start()
    # A daemon: a run that ends before it is done does not wait for it.
    threading.Thread(target=self.compress, daemon=True).start()
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.bar.stop()
    # The thread of `compress` writes to none of them.
    for log in (self.metrics, self.loads, self.board):
      log.close()

  def say(self, *lines: str) -> None:
    """Prints lines for the person at the terminal, above the live line where there is one."""
    self.console.print(*lines, sep='\n', markup=False)

  def save_failed(self, step: int, why: str) -> None:
    """Tells of a save that did not reach the disk.

    saves_failed is a row of its own: no other has another number.
    """
    self.say(f'save of step {step} failed, {why}')
    self.metrics.write({'step': step, 'saves_failed': 1})
    self.board.scalars(step, {'saves_failed': 1})

  def compress(self) -> None:
    """Finds what gzip and xz make of the held-out text.

    It is seconds of work that nothing waits for, and that hold up no exit.
    """
    cache = cache_directory(self.cfg.data.cache_dir)
    for name, bits in compress_held_out(self.data, cache):
      self.compressed = self.compressed | {name: bits}  # not in place: it is being read

  def step(self, step: int, metrics: Metrics) -> None:
    """Reads a step's metrics, waiting for it if need be; writes them where they are due."""
    # Asking whether it was skipped is what waits for the step.
    self.skips_in_a_row = self.skips_in_a_row + 1 if metrics['skipped'] else 0
    if metrics['skipped']:
      self.say(
        f'step {step} skipped: loss {metrics["loss"]:.4g}, '
        f'gradient norm {metrics["grad_norm"]:.4g} ({self.skips_in_a_row} in a row)'
      )
    self.bar.update(self.task, completed=step, description=f'step {step}/{self.cfg.steps}')
    self.throughput.count_step()
    if step > 1 and step % self.cfg.log_every and step != self.cfg.steps:
      # Every step of the last tenth counts in the report, and so has a row of its losses.
      if step > tail_start(self.cfg.steps):
        self.metrics.write({'step': step} | loss_row(metrics))
      return
    metrics = jax.device_get(metrics)
    load, dropped = metrics['load'], metrics['layers']['dropped']
    row, layers = training_row(metrics, self.data.bytes_per_token)
    row |= self.throughput.row()
    row['alarms'] = count_alarms(load, dropped, self.cfg.model.moe.router.top_k)
    self.metrics.write({'step': step} | row | {'layers': layers})
    self.loads.write({'step': step, 'load': load.astype(int).tolist()})
    self.board.scalars(step, row)
    for alarm in self.alarms.update(step, load, dropped):
      self.say(alarm)
    self.show_progress(step, row)

  def show_progress(self, step: int, row: Mapping[str, float]) -> None:
    """Prints the line of a step, cut to the width of the terminal where there is one."""
    tokens_left = (self.cfg.steps - step) * self.cfg.batch_size * self.cfg.seq_len
    seconds_left = tokens_left / row['tokens_per_second']
    columns = self.console.width if self.console.is_terminal else 0
    self.say(progress_text(step, self.cfg.steps, row, seconds_left, columns))

  def validation(
    self, step: int, sums: ValidationSums, probe: np.ndarray, interference: Metrics, text: str
  ) -> float:
    """Writes what a validation found; returns bits per byte of the held-out text.

    Args:
      sums: over the batches of the validation, see `add_sums`.
      probe: [L, T, K] u16, see routing_probe.py.
      interference: scalars by name; {} where it was not asked for.
      text: the prompt, and what the model made of it; '' where no sample is drawn.
    """
    churn = self.probes.record(step, probe)
    row, layers = validation_row(sums, self.cfg.model.moe.router, self.data, churn)
    row |= {f'interference/{name}': float(value) for name, value in interference.items()}
    # A finished run that is started again validates again, and has its row.
    if step not in self.validated:
      self.metrics.write({'step': step} | row | {'eval/layers': layers})
    self.board.scalars(step, row)
    self.board.text('sample', text, step)
    self.draw_loads(step)
    bars = ' '.join(f'[{load_bars(load)}]' for load in sums['load'])
    self.text = text
    self.usage = (
      f'{100 * row["eval/expert_usage"]:.0f}% of experts used, '
      f'MaxVio {row["eval/max_vio"]:.2f} (noise {row["eval/noise_floor"]:.2f}), load {bars}'
    )
    others = ''.join(f', {name} {value:.3f}' for name, value in self.compressed.items())
    bpb, tokens = row['eval/bits_per_byte'], int(sums['task_tokens'].sum())
    self.say(
      f'step {step}: {bpb:.4f} bits per byte of held-out text ({tokens} tokens{others}); '
      f'{self.usage}'
    )
    return bpb

  def draw_loads(self, step: int) -> None:
    """Each MoE layer's expert load over the steps so far, as pictures for TensorBoard."""
    history = np.array([row['load'] for row in self.loads.rows()])  # [steps logged, L, E]
    # No step was logged where a run is validated before its first one: then there is no L either.
    layers = history.shape[1] if history.size else 0
    for layer in range(layers):
      self.board.image(f'expert_load/layer_{layer}', load_image(history[:, layer]), step)

  def report(self, digest: str, bpb: float) -> None:
    """Writes report.json, and says the same in words.

    Args:
      digest: of the last state.
      bpb: bits per byte of the last validation.
    """
    rows = self.metrics.rows()
    last = row_of_step(rows, self.cfg.steps)
    watched = monitors(last)
    sides = compare_sides(rows, last, self.cfg.steps, self.data)
    report = {
      'bits_per_byte': bpb,
      'sides': {task: of._asdict() for task, of in sides.items()},
      'best_bits_per_byte': best_bits_per_byte(rows, bpb),
      'not_finite': non_finite_validations(rows),
      'digest': digest,
      **self.compressed,
      **watched,
      'saturation': self.saturation(last),
    }
    with warn_once(self.workdir / 'report.json'):
      write_whole(self.workdir / 'report.json', as_json(report, indent=2) + '\n')
    lines = report_lines(
      report,
      watched,
      self.compressed,
      compared=comparison_lines(sides),
      usage=self.usage,
      text=self.text,
      workdir=self.workdir,
      prompt=self.cfg.sample_prompt,
    )
    self.say(*lines)

  def saturation(self, last: Mapping[str, object]) -> dict[str, float]:
    """Of each validation but the last, the share of its probe's copies that already went where they
    end, as a mean over layers, by the step; also written.

    last: the row of the last step.
    """
    layers = self.probes.saturation()
    # A finished run that is started again has its row.
    if layers and 'eval/saturation' not in last:
      by_step = {str(step): share for step, share in layers.items()}
      self.metrics.write({'step': self.cfg.steps, 'eval/saturation': by_step})
      for step, share in layers.items():
        scalars = {'eval/saturation': share.mean(), 'eval/saturation_worst': share.min()}
        self.board.scalars(step, scalars)
    return {str(step): float(share.mean()) for step, share in layers.items()}


class NullJournal:
  """A journal that writes nothing: for every process but the first.

  It decides as a Journal does: all processes must skip, diverge and score alike.
  """

  def __init__(self, cfg: ExperimentConfig, data: Data) -> None:
    self.cfg, self.data, self.skips_in_a_row = cfg, data, 0
    self.throughput = Throughput(cfg.batch_size * cfg.seq_len, flops_per_token=0)

  def __enter__(self) -> 'NullJournal':
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    """Closes nothing: nothing is open."""

  def say(self, *lines: str) -> None:
    """Prints nothing: the first process does."""

  def save_failed(self, step: int, why: str) -> None:
    """Tells nothing: the first process does."""

  def step(self, step: int, metrics: Metrics) -> None:
    """Waits for a step, as a Journal does, so that no process runs ahead."""
    self.skips_in_a_row = self.skips_in_a_row + 1 if metrics['skipped'] else 0

  def validation(
    self, step: int, sums: ValidationSums, probe: np.ndarray, interference: Metrics, text: str
  ) -> float:
    """Bits per byte of the held-out text, as a Journal finds them."""
    row, _ = validation_row(sums, self.cfg.model.moe.router, self.data, {})
    return row['eval/bits_per_byte']

  def report(self, digest: str, bpb: float) -> None:
    """Writes nothing: the first process does."""


def open_journal(
  cfg: ExperimentConfig, data: Data, flops_per_token: int, step: int
) -> Journal | NullJournal:
  """The journal of this process: only the first one writes.

  step: where the run starts; later lines of an earlier process are cut away.
  """
  return Journal(cfg, data, flops_per_token, step) if is_first_process() else NullJournal(cfg, data)
