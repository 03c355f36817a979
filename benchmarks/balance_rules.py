"""Does balance work: none, a sequence loss, loss-free rules, on one model, one seed, one text.

  python -m benchmarks.balance_rules [--steps=300] [--only=sign] [--quick]

The config is configs/tiny.py but for its balance. MaxVio is global: of the load over all held-out
text, 0 at balance.
"""

import argparse
import dataclasses
import functools
import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.tiny import get_config
from moejax.config import from_config_dict, frozendict
from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.statistics import layer_statistics
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import compile_step, eval_step

# name -> what keeps experts even
BALANCES = {
  'none': BalanceConfig(),
  'sequence 1e-3': BalanceConfig(losses=frozendict(sequence='0.001')),
  'sign bias': BalanceConfig(bias_rule='sign'),
  'quantile bias': BalanceConfig(bias_rule='quantile'),
}


def smallest(cfg: ExperimentConfig) -> ExperimentConfig:
  """What `--quick` trains: two steps of one narrow layer, on a text that is made on the spot."""
  model = dataclasses.replace(cfg.model, num_layers=1, d_model=32)
  data = DataConfig(source='synthetic', tokenizer='bytes', synthetic_tokens=20_000)
  return dataclasses.replace(cfg, steps=2, batch_size=8, seq_len=32, model=model, data=data)


def trained(cfg: ExperimentConfig, data: Data, name: str) -> TrainState:
  """The state after all steps."""
  state = jax.jit(functools.partial(init_state, cfg))()
  step = compile_step(cfg, state, data.batch(0))
  for i in track(range(cfg.steps), f'{name:14}', console=Console(stderr=True)):
    state, metrics = step(state, data.batch(i))
    jax.block_until_ready(metrics)
  return state


def measured(cfg: ExperimentConfig, data: Data, state: TrainState) -> dict[str, np.ndarray]:
  """Of the whole held-out text: bits per byte, and each layer's MaxVio, noise floor and usage."""
  evaluate = jax.jit(functools.partial(eval_step, cfg=cfg))
  nats, load = 0.0, 0.0
  for batch in data.validation():
    sums = jax.device_get(evaluate(state.model, state.router, batch))
    nats, load = nats + sums['task_nll'].sum(), load + sums['load']
  layers = layer_statistics(load, cfg.model.moe.router.top_k)
  return layers | {'bits_per_byte': nats / np.log(2) / data.validation_bytes}


def main() -> None:
  """Trains each, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--only', default='', help='names that contain this')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  base = dataclasses.replace(from_config_dict(ExperimentConfig, get_config()), steps=args.steps)
  if args.quick:
    base = smallest(base)
  data = open_data(base.data, batch_size=base.batch_size, seq_len=base.seq_len, seed=base.seed)
  base = with_vocabulary(base, data.vocab_size)
  run = f'{base.steps} steps of configs/tiny.py, seed {base.seed}'
  table = Table('balance', title=f'{run}; {data.validation_tokens} tokens')
  for column in (
    'MaxVio',
    'worst layer',
    'noise floor',
    'experts used',
    'bits per byte',
    'seconds',
  ):
    table.add_column(column, justify='right')
  for name, balance in BALANCES.items():
    if args.only not in name:
      continue
    since, cfg = time.perf_counter(), dataclasses.replace(base, balance=balance)
    found = measured(cfg, data, trained(cfg, data, name))
    vio = found['max_vio']
    row = [
      f'{vio.mean():.3f}',
      f'{vio.max():.3f}',
      f'{found["noise_floor"].mean():.3f}',
      f'{found["expert_usage"].mean():.0%}',
      f'{found["bits_per_byte"]:.4f}',
      f'{time.perf_counter() - since:.0f}',
    ]
    print(name, *row, flush=True)
    table.add_row(name, *row)
  Console().print(table)


if __name__ == '__main__':
  main()
