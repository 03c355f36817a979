"""What a run tells: a line a person reads, metrics.jsonl and TensorBoard for tools, a report at the end.

Every number of a line but the clock's belongs to that one step, so that a resumed run writes the lines that an
uninterrupted one would have written, bit for bit.
"""

import json
import math
import os
import pathlib
import sys
import threading
import time
from types import TracebackType

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from moejax.compressors import gzip_bits_per_byte, xz_bits_per_byte
from moejax.data import Data
from moejax.experiment import ExperimentConfig
from moejax.metrics import MetricsLog, TensorBoard, load_bars, load_image, mfu, router_statistics
from moejax.step import Metrics

BITS_PER_NAT = 1 / math.log(2)


class Journal:
  """Opened for a run at the step it starts from; what an earlier process wrote after that step is cut away."""

  def __init__(self, cfg: ExperimentConfig, data: Data, flops_per_token: int, step: int) -> None:
    self.workdir = pathlib.Path(cfg.workdir)
    self.cfg, self.data, self.flops_per_token, self.skips_in_a_row = cfg, data, flops_per_token, 0
    self.metrics = MetricsLog(self.workdir / 'metrics.jsonl', step)
    self.loads = MetricsLog(self.workdir / 'load.jsonl', step)
    self.board = TensorBoard(self.workdir / 'tensorboard', step)
    self.console = Console(highlight=False, soft_wrap=True, force_jupyter=False)  # plain lines in a notebook, too
    self.bar = Progress(TextColumn('{task.description}'), console=self.console, disable=not self.console.is_terminal)
    self.task = self.bar.add_task('compiling', total=cfg.steps, completed=step)
    self.usage, self.text = '', ''
    self.compressed: dict[str, float] = {}
    self.resume_clock()

  def __enter__(self) -> 'Journal':
    self.bar.start()
    # Seconds of work that nothing waits for; a daemon, so that it holds up no exit.
    threading.Thread(target=self.compress, daemon=True).start()
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
    self.bar.stop()
    for log in (self.metrics, self.loads, self.board):
      log.close()

  def say(self, *lines: str) -> None:
    """Lines for the person at the terminal, above the progress bar where there is one."""
    self.console.print(*lines, sep='\n', markup=False)

  def compress(self) -> None:
    """What gzip and xz make of the held-out text, found in the background."""
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
      self.say(f'step {step} skipped: its loss or gradient is not finite ({self.skips_in_a_row} in a row)')
    self.tokens += self.cfg.batch_size * self.cfg.seq_len
    if step > 1 and step % self.cfg.log_every and step != self.cfg.steps:
      return
    metrics = jax.device_get(metrics)
    load = metrics.pop('load')
    row = {name: float(value) for name, value in metrics.items()}
    row |= {name: float(value) for name, value in router_statistics(load, self.cfg.model.moe.router.top_k).items()}
    row['bits_per_byte'] = row['lm_loss'] * BITS_PER_NAT / self.data.bytes_per_token
    row['tokens_per_second'] = self.tokens / (time.perf_counter() - self.since)
    row['mfu'] = mfu(row['tokens_per_second'], self.flops_per_token, jax.devices())
    self.metrics.write({'step': step} | row)
    self.loads.write({'step': step, 'load': load.astype(int).tolist()})
    self.board.scalars(step, row)
    self.show(step, row)

  def show(self, step: int, row: dict[str, float]) -> None:
    """The progress line."""
    left = (self.cfg.steps - step) * self.cfg.batch_size * self.cfg.seq_len / row['tokens_per_second']
    balance = ''.join(f'  {name.removeprefix("balance/")} {value:.3f}' for name, value in sorted(row.items())
                      if name.startswith('balance/'))
    line = (f'step {step:>{len(str(self.cfg.steps))}}/{self.cfg.steps}  loss {row["lm_loss"]:.3f}  '
            f'bpb {row["bits_per_byte"]:.3f}{balance}  MaxVio {row["max_vio"]:.2f}  '
            f'{row["tokens_per_second"] / 1000:.1f}k tok/s  {clock(left)} left')
    self.bar.update(self.task, completed=step, description=line.removesuffix(' left'))   # 80 columns hold that
    if not self.console.is_terminal:
      self.say(line)

  def validation(self, step: int, sums: dict[str, np.ndarray], text: str) -> float:
    """Writes what validation found; returns bits per byte of the held-out text."""
    nats_per_token = float(sums['nll']) / float(sums['tokens'])
    bpb = nats_per_token * BITS_PER_NAT * self.data.validation_tokens / self.data.validation_bytes
    router = router_statistics(sums['load'], self.cfg.model.moe.router.top_k)
    row = {'eval/bits_per_byte': bpb, 'eval/lm_loss': nats_per_token} | {
      f'eval/{name}': float(value) for name, value in router.items()}
    if not any(old['step'] == step and 'eval/lm_loss' in old for old in self.metrics.rows()):  # a finished run, again
      self.metrics.write({'step': step} | row)
    self.board.scalars(step, row)
    self.board.text('sample', text, step)
    self.images(step)
    self.text = text
    self.usage = (f'{100 * row["eval/expert_usage"]:.0f}% of experts used, MaxVio {row["eval/max_vio"]:.2f}, load '
                  + ' '.join(f'[{load_bars(layer)}]' for layer in sums['load']))
    others = ''.join(f', {name} {value:.3f}' for name, value in self.compressed.items())
    self.say(f'step {step}: {bpb:.4f} bits per byte of held-out text ({int(sums["tokens"])} tokens{others}); '
             f'{self.usage}')
    return bpb

  def images(self, step: int) -> None:
    """Each MoE layer's expert load over the steps so far, as pictures for TensorBoard."""
    history = np.array([row['load'] for row in self.loads.rows()])            # [steps logged, L, E]
    for layer in range(history.shape[1] if history.size else 0):
      self.board.image(f'expert_load/layer_{layer}', load_image(history[:, layer]), step)

  def report(self, digest: str, bpb: float) -> None:
    """The last words, also as report.json."""
    found = [row['eval/bits_per_byte'] for row in self.metrics.rows() if 'eval/bits_per_byte' in row]
    best = min((value for value in found if value is not None), default=bpb)   # null: it was not finite
    report = {'bits_per_byte': bpb, 'best_bits_per_byte': best, 'digest': digest, **self.compressed}
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    (self.workdir / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    self.say(
      'it writes:', '', *(f'  {line}' for line in self.text.split('\n')), '',
      f'done. {best:.4f} bits per byte at best, {bpb:.4f} at the end' +
      ''.join(f'; {name} {value:.3f}' for name, value in self.compressed.items()),
      f'experts  {self.usage}, on held-out text',
      f'state    digest {digest[:16]}',
      f'run      {self.workdir}: metrics.jsonl, tensorboard (tensorboard --logdir={self.workdir}), checkpoints',
      f'sample   {python} -m moejax.generate --workdir={self.workdir} --prompt="{self.cfg.sample_prompt}"')


def clock(seconds: float) -> str:
  """75 -> '1m15s'."""
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m{seconds:02}s'
