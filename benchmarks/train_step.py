"""How fast is a whole training step beside the same model in torch and transformers?

  python -m benchmarks.train_step [--rounds 9] [--steps 4] [--threads 2] [--quick]

Both have D 256, 4 layers, 8 experts top-2 of width 512, 4 heads, vocabulary 4096, 8 rows of 256
tokens, float32, a balance loss, clipping by global norm, AdamW. Each runs in a process of its own,
because their thread pools would otherwise fight for the cores: OpenMP's threads spin for a while
after each call. They take turns, a few steps a round, while the others wait; so what slows the
machine slows all. They get the same environment, huge pages included, and of transformers' ways to
run experts the fastest is what we compare with. It takes a quiet machine: spinning threads lose
more than ours where other programs want the cores. Without torch and transformers, which the extra
`bench` installs, ours runs alone.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Size(NamedTuple):
  """The model and its batch. Letters: D model, F hidden of an expert, L layers, H heads, E experts,
  K experts per token, V vocabulary, B batch, S sequence."""

  D: int = 256
  F: int = 512
  L: int = 4
  H: int = 4
  E: int = 8
  K: int = 2
  V: int = 4096
  B: int = 8
  S: int = 256


SMALLEST = Size(D=16, F=16, L=1, H=2, E=4, V=64, B=2, S=16)
OURS = 'moejax'
PEERS = {'transformers Mixtral, eager': 'eager', 'transformers Mixtral, grouped_mm': 'grouped_mm'}
Step = Callable[[], float]  # one step -> loss; returns when the step is done


def peers() -> tuple[str, ...]:
  """Those that can run here."""
  installed = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))
  return tuple(PEERS) if installed else ()


def our_step(size: Size) -> tuple[int, Step]:
  """(parameters, step) of moejax, compiled as the trainer does it."""
  import functools

  import jax
  import numpy as np

  from moejax.config import frozendict
  from moejax.data.batch import make_batch
  from moejax.model.config import AttentionConfig, ModelConfig
  from moejax.moe.balance.config import BalanceConfig
  from moejax.moe.layer import MoEConfig
  from moejax.moe.routing import RouterConfig
  from moejax.train.experiment.config import ExperimentConfig
  from moejax.train.optimizer import OptimConfig
  from moejax.train.step.train_state import init_state
  from moejax.train.step.train_step import compile_step

  model = ModelConfig(
    vocab_size=size.V,
    d_model=size.D,
    num_layers=size.L,
    unroll=size.L,
    attention=AttentionConfig(size.H, num_kv_heads=size.H, d_head=size.D // size.H),
    moe=MoEConfig(RouterConfig(size.E, size.K), d_expert=size.F),
  )
  cfg = ExperimentConfig(
    batch_size=size.B,
    seq_len=size.S,
    model=model,
    balance=BalanceConfig(losses=frozendict(global_batch=0.01)),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, schedule='constant'),
  )
  shape = size.B, size.S + 1
  tokens = np.random.default_rng(0).integers(0, size.V, shape, dtype=np.int32)
  batch = make_batch(tokens[:, :-1], tokens[:, 1:])
  state = jax.jit(functools.partial(init_state, cfg))()
  step = compile_step(cfg, state, batch)

  def run() -> float:
    nonlocal state
    state, metrics = step(state, batch)
    return float(jax.block_until_ready((state, metrics))[1]['lm_loss'])

  return sum(leaf.size for leaf in jax.tree.leaves(state.model)), run


def their_step(size: Size, experts: str, threads: int) -> tuple[int, Step]:
  """(parameters, step) of the same model in torch."""
  import torch
  from transformers import MixtralConfig, MixtralForCausalLM

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = MixtralForCausalLM(
    MixtralConfig(
      vocab_size=size.V,
      hidden_size=size.D,
      intermediate_size=size.F,
      num_hidden_layers=size.L,
      num_attention_heads=size.H,
      num_key_value_heads=size.H,
      num_local_experts=size.E,
      num_experts_per_tok=size.K,
      tie_word_embeddings=False,
      output_router_logits=True,
      router_aux_loss_coef=0.01,
      use_cache=False,
      attn_implementation='sdpa',
      experts_implementation=experts,
    )
  ).train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  tokens = torch.randint(0, size.V, (size.B, size.S))

  def run() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return sum(p.numel() for p in model.parameters()), run


def work(name: str, size: Size, steps: int, threads: int) -> None:
  """A worker: says its number of parameters, then, for each line it reads, seconds and loss of
  steps."""
  count, step = our_step(size) if name == OURS else their_step(size, PEERS[name], threads)
  for _ in range(3):
    step()
  print(count, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    losses = [step() for _ in range(steps)]
    print(time.perf_counter() - start, losses[-1], flush=True)


class Result(NamedTuple):
  """What one of the racers did."""

  name: str
  parameters: int
  rates: list[float]  # tokens/s of each round
  loss: float  # the last


def race(size: Size, rounds: int, args: argparse.Namespace) -> Iterator[Result]:
  """The result of each worker, all having taken turns."""
  tunables = 'glibc.malloc.hugetlb=1'
  env = os.environ | {'GLIBC_TUNABLES': tunables, 'OMP_NUM_THREADS': str(args.threads)}
  names = [OURS, *peers()]
  flags = [f'--steps={args.steps}', f'--threads={args.threads}', *['--quick'] * args.quick]
  workers = [
    subprocess.Popen(
      [sys.executable, __file__, f'--worker={name}', *flags],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      bufsize=1,
      env=env,
    )
    for name in names
  ]
  counts = [int(worker.stdout.readline()) for worker in workers]
  rates: list[list[float]] = [[] for _ in names]
  losses = [0.0] * len(names)
  for _ in range(rounds):
    for i, worker in enumerate(workers):
      worker.stdin.write('go\n')
      seconds, losses[i] = map(float, worker.stdout.readline().split())
      rates[i].append(size.B * size.S * args.steps / seconds)
  for worker in workers:
    worker.communicate()
  yield from map(Result, names, counts, rates, losses)


def race_table(results: list[Result]) -> Table:
  """A row for each racer; ratios are to the fastest peer, round by round, where there is one."""
  theirs = [result.rates for result in results if result.name != OURS]
  table = Table(
    'whole training step', 'tokens/s: median (least - most)', 'over the best peer', 'loss'
  )
  for name, _, rates, loss in results:
    row = [f'{statistics.median(rates):.0f} ({min(rates):.0f} - {max(rates):.0f})', '-']
    if theirs:
      best = max(theirs, key=statistics.median)
      ratios = [a / b for a, b in zip(rates, best, strict=True)]
      row[1] = f'{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})'
    table.add_row(name, *row, f'{loss:.2f}')
  return table


def main() -> None:
  """Prints tokens/s of each, and ours over the faster of theirs, round by round."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--steps', type=int, default=4, help='steps of each in a round')
  parser.add_argument(
    '--threads', type=int, default=2, help='of torch; ours takes the cores that are there'
  )
  parser.add_argument('--worker', default='', help=argparse.SUPPRESS)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  size, rounds = (SMALLEST, 1) if args.quick else (Size(), args.rounds)
  if args.worker:
    return work(args.worker, size, args.steps, args.threads)
  results = list(race(size, rounds, args))
  if len({result.parameters for result in results}) != 1:
    counts = [(result.name, result.parameters) for result in results]
    raise SystemExit(f'not the same model: {counts} parameters')
  console = Console(width=110)
  parameters = f'{results[0].parameters / 1e6:.2f} M parameters each'
  console.print(f'{parameters}, {size.B} x {size.S} tokens a step, {rounds} rounds')
  console.print(race_table(results))


if __name__ == '__main__':
  main()
