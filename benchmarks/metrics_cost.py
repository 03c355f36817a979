"""What do the statistics cost? The compiled training step with all of them over one without any.

  python -m benchmarks.metrics_cost [--rounds=30 --shapes tiny experts_64] [--quick]

Without: `observe` gives zeros, which XLA folds away with all that only statistics need (margins,
the top-K without the bias), and no statistic is made of what is left. Both programs are compiled as
the trainer does it. They take turns, a step each, so that what slows the machine slows both; the
ratio is taken pair by pair. Beside the time on the clock stands the processors' time, which other
programs on the machine disturb less.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from configs.tiny import get_config
from moejax.config import from_config_dict, frozendict
from moejax.data.batch import Batch, make_batch
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.statistics import Stats, observe
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import compile_step

VOCABULARY = 4096


def tiny() -> ExperimentConfig:
  """configs/tiny.py."""
  return with_vocabulary(from_config_dict(ExperimentConfig, get_config()), VOCABULARY)


def of(num_experts: int, d_expert: int, d_model: int, num_layers: int) -> ExperimentConfig:
  """The tiny config with eight of many experts, sigmoid scores, a bias, and a loss that counts what
  was dispatched."""
  cfg = tiny()
  moe = MoEConfig(router=RouterConfig(num_experts, 8, 'sigmoid'), d_expert=d_expert)
  balance = BalanceConfig(
    losses=frozendict(global_batch='0.01'), bias_rule='sign', assignment='dispatched'
  )
  model = dataclasses.replace(cfg.model, d_model=d_model, num_layers=num_layers, moe=moe)
  return dataclasses.replace(cfg, model=model, balance=balance)


def smallest() -> ExperimentConfig:
  """What `--quick` runs: one narrow layer, and few tokens."""
  return dataclasses.replace(of(16, 16, 32, 1), batch_size=2, seq_len=16)


def nothing(routing: Routing, unbiased_ids: jax.Array, mask: jax.Array) -> Stats:
  """`observe`, blind."""
  shapes = jax.eval_shape(observe, routing, unbiased_ids, mask)
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


class Racer:
  """One compiled step and the state that it drives."""

  def __init__(self, cfg: ExperimentConfig, batch: Batch, with_statistics: bool) -> None:
    off = (
      mock.patch.multiple('moejax.moe.layer', observe=nothing),
      mock.patch.multiple('moejax.train.step.train_step', statistics=lambda sums, router, cfg: {}),
    )
    self.state: TrainState = jax.jit(functools.partial(init_state, cfg))()
    self.batch = jax.device_put(batch)
    for patch in () if with_statistics else off:
      patch.start()
    self.program = compile_step(cfg, self.state, self.batch)
    mock.patch.stopall()

  def step(self) -> tuple[float, float]:
    """Seconds of one step: of the clock, of the processors."""
    clock, work = time.perf_counter(), time.process_time()
    self.state, metrics = jax.block_until_ready(self.program(self.state, self.batch))
    assert np.isfinite(metrics['loss'])
    return time.perf_counter() - clock, time.process_time() - work


def race(cfg: ExperimentConfig, rounds: int) -> np.ndarray:
  """Seconds of each step. [rounds, with and without, clock and processors]."""
  tokens = np.random.default_rng(0).integers(
    0, VOCABULARY, (cfg.batch_size, cfg.seq_len + 1), dtype=np.int32
  )
  batch = make_batch(tokens[:, :-1], tokens[:, 1:])
  racers = [Racer(cfg, batch, with_statistics) for with_statistics in (True, False)]
  for racer in racers * 2:
    racer.step()
  seconds = np.zeros((rounds, 2, 2))
  for i in range(rounds):
    for which in (0, 1) if i % 2 else (1, 0):
      seconds[i, which] = racers[which].step()
  return seconds


def spread(ratios: np.ndarray) -> str:
  """Median and the middle half."""
  low, middle, high = np.percentile(ratios, [25, 50, 75])
  return f'{middle:.3f} ({low:.3f} - {high:.3f})'


def main() -> None:
  """Prints, for each shape, the step's time and what the statistics multiply it by."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--shapes', nargs='*', default=list(SHAPES), choices=list(SHAPES))
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  if args.quick:
    args.rounds, args.shapes = 2, ['smallest']
  table = Table('shape', 'ms a step', 'with / without, clock', 'with / without, processors')
  for name in args.shapes:
    seconds = race((SHAPES | {'smallest': smallest})[name](), args.rounds)
    ratios = seconds[:, 0] / seconds[:, 1]
    table.add_row(
      name,
      f'{1e3 * statistics.median(seconds[:, 1, 0]):.0f}',
      spread(ratios[:, 0]),
      spread(ratios[:, 1]),
    )
  console = Console(width=100)
  console.print(
    f'{args.rounds} pairs of steps on {jax.devices()[0].device_kind}; median (middle half)'
  )
  console.print(table)


SHAPES = {
  'tiny': tiny,
  'tiny_4_micro_batches': lambda: dataclasses.replace(tiny(), micro_batches=4),
  'experts_64': lambda: of(64, 128, 256, 4),
  'experts_256': lambda: of(256, 256, 512, 2),
}

if __name__ == '__main__':
  main()
