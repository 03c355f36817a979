"""How fast is a whole training step beside the same model in torch and transformers?

  python benchmarks/train_step.py [--rounds 9] [--steps 4] [--threads 2]          needs the extra `bench`

Both have D 256, 4 layers, 8 experts top-2 of width 512, 4 heads, vocabulary 4096, 8 rows of 256 tokens,
float32, a balance loss, clipping by global norm, AdamW. Each runs in a process of its own, because their
thread pools would otherwise fight for the cores: OpenMP's threads spin for a while after each call. They
take turns, a few steps a round, while the others wait; so what slows the machine slows all. They get the
same environment, huge pages included, and of transformers' ways to run experts the fastest is what we
compare with. It takes a quiet machine: spinning threads lose more than ours where other programs want the
cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

D, F, L, H, E, K, V, B, S = 256, 512, 4, 4, 8, 2, 4096, 8, 256
OURS = 'moejax'
PEERS = {'transformers Mixtral, eager': 'eager', 'transformers Mixtral, grouped_mm': 'grouped_mm'}
Step = Callable[[], float]  # one step -> loss; returns when the step is done


def our_step() -> tuple[int, Step]:
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
    vocab_size=V,
    d_model=D,
    num_layers=L,
    unroll=L,
    attention=AttentionConfig(num_heads=H, num_kv_heads=H, d_head=D // H),
    moe=MoEConfig(router=RouterConfig(num_experts=E, top_k=K), d_expert=F),
  )
  cfg = ExperimentConfig(
    batch_size=B,
    seq_len=S,
    model=model,
    balance=BalanceConfig(losses=frozendict(global_batch=0.01)),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, schedule='constant'),
  )
  tokens = np.random.default_rng(0).integers(0, V, (B, S + 1), dtype=np.int32)
  batch = make_batch(tokens[:, :-1], tokens[:, 1:])
  state = jax.jit(functools.partial(init_state, cfg))()
  step = compile_step(cfg, state, batch)

  def run() -> float:
    nonlocal state
    state, metrics = step(state, batch)
    return float(jax.block_until_ready((state, metrics))[1]['lm_loss'])

  return sum(leaf.size for leaf in jax.tree.leaves(state.model)), run


def their_step(experts: str, threads: int) -> tuple[int, Step]:
  """(parameters, step) of the same model in torch."""
  import torch
  from transformers import MixtralConfig, MixtralForCausalLM

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = MixtralForCausalLM(
    MixtralConfig(
      vocab_size=V,
      hidden_size=D,
      intermediate_size=F,
      num_hidden_layers=L,
      num_attention_heads=H,
      num_key_value_heads=H,
      num_local_experts=E,
      num_experts_per_tok=K,
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
  tokens = torch.randint(0, V, (B, S))

  def run() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return sum(p.numel() for p in model.parameters()), run


def work(name: str, steps: int, threads: int) -> None:
  """A worker: says its number of parameters, then, for each line it reads, seconds and loss of steps."""
  count, step = our_step() if name == OURS else their_step(PEERS[name], threads)
  for _ in range(3):
    step()
  print(count, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    losses = [step() for _ in range(steps)]
    print(time.perf_counter() - start, losses[-1], flush=True)


def race(rounds: int, steps: int, threads: int) -> Iterator[tuple[str, int, list[float], float]]:
  """name, parameters, tokens/s of each round and the last loss of each worker, all having taken turns."""
  env = os.environ | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1', 'OMP_NUM_THREADS': str(threads)}
  names = [OURS, *PEERS]
  workers = [
    subprocess.Popen(
      [sys.executable, __file__, f'--worker={name}', f'--steps={steps}', f'--threads={threads}'],
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
      rates[i].append(B * S * steps / seconds)
  for worker in workers:
    worker.communicate()
  yield from zip(names, counts, rates, losses, strict=True)


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
  args = parser.parse_args()
  if args.worker:
    return work(args.worker, args.steps, args.threads)
  results = list(race(args.rounds, args.steps, args.threads))
  if len({count for _, count, _, _ in results}) != 1:
    raise SystemExit(
      f'not the same model: {[(name, count) for name, count, _, _ in results]} parameters'
    )
  best = max((rates for name, _, rates, _ in results if name != OURS), key=statistics.median)
  table = Table(
    'whole training step', 'tokens/s: median (least - most)', 'over the best peer', 'loss'
  )
  for name, _, rates, loss in results:
    ratios = [a / b for a, b in zip(rates, best, strict=True)]
    table.add_row(
      name,
      f'{statistics.median(rates):.0f} ({min(rates):.0f} - {max(rates):.0f})',
      f'{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})',
      f'{loss:.2f}',
    )
  console = Console(width=110)
  console.print(
    f'{results[0][1] / 1e6:.2f} M parameters each, {B} x {S} tokens a step, {args.rounds} rounds'
  )
  console.print(table)


if __name__ == '__main__':
  main()
