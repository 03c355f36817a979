"""What does an expert layer cost beside one dense MLP of equal active FLOPs, for each way of dispatching?

  python benchmarks/moe_layer.py [--experts 8 32 64] [--rounds 7] [--peer]

The load is uneven, as a router's is. Each round times every row and takes its ratio to the dense MLP of that
round, so that a machine that slows down slows both; printed are the median ratio and its range over rounds.
Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token, T = B * S, N = T * K.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from moejax.moe.dispatch.dispatchers import DISPATCHERS, DispatchConfig
from moejax.moe.experts.ffn import swiglu
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Weights
from moejax.moe.routing import RouterConfig, Routing, route
from moejax.moe.token_sets import expert_load

B, S, D, F, K = 8, 256, 256, 512, 2
CAPACITY = 1.25
BASE = 'one dense MLP'
Inputs = tuple[Array, Array, Weights]  # x [B, S, D], logits [B, S, E], experts
Function = Callable[[Array, Array, Weights], Array]  # -> y [B, S, D]


def dense_mlp(x: Array, logits: Array, weights: Weights) -> Array:
  """One MLP of hidden size K * F: what every token would cost if there was nothing to choose.

  Tokens in one axis: on CPU, XLA's gradient to a matrix takes two to three times as long with two of them.
  """
  del logits
  tokens = x.reshape(-1, x.shape[-1])
  return (swiglu(tokens @ weights.gate, tokens @ weights.up) @ weights.down).reshape(x.shape)


def dispatched(x: Array, logits: Array, weights: Weights, cfg: DispatchConfig) -> Array:
  """Routing and dispatch, as the layer does them."""
  routing = route(logits, jnp.zeros(logits.shape[-1]), RouterConfig(logits.shape[-1], K))
  return DISPATCHERS[cfg.dispatcher](x, routing, weights, swiglu, cfg)[0]


def ragged_dot(x: Array, logits: Array, weights: Weights) -> Array:
  """The peer: JAX's own grouped matmul over sorted copies, with a gather before it and a scatter after it."""
  routing: Routing = route(logits, jnp.zeros(logits.shape[-1]), RouterConfig(logits.shape[-1], K))
  copies = sort_copies(
    routing.expert_ids.reshape(-1, K), routing.weights.reshape(-1, K), logits.shape[-1]
  )
  rows = x.reshape(-1, D)[copies.tokens]
  hidden = swiglu(*(jax.lax.ragged_dot(rows, w, copies.load) for w in (weights.gate, weights.up)))
  out = jax.lax.ragged_dot(hidden, weights.down, copies.load) * copies.weights[:, None]
  return jnp.zeros((B * S, D)).at[copies.tokens].add(out).reshape(x.shape)


def inputs(num_experts: int) -> tuple[Inputs, Inputs]:
  """What the dense MLP gets, and what the experts get: logits that favour some experts."""
  keys = jax.random.split(jax.random.key(0), 9)

  def normal(key: Array, *shape: int) -> Array:
    return jax.random.normal(key, shape) * 0.02

  x = jax.random.normal(keys[0], (B, S, D))
  logits = jax.random.normal(keys[1], (B, S, num_experts)) + 0.5 * jax.random.normal(
    keys[2], (num_experts,)
  )
  dense = Weights(normal(keys[3], D, K * F), normal(keys[4], D, K * F), normal(keys[5], K * F, D))
  experts = Weights(
    normal(keys[6], num_experts, D, F),
    normal(keys[7], num_experts, D, F),
    normal(keys[8], num_experts, F, D),
  )
  return (x, logits, dense), (x, logits, experts)


def compiled(function: Function, args: Inputs, backward: bool) -> Callable[[], float]:
  """A call that gives the seconds of the best of three; the gradient is to x, logits and all weights."""

  def objective(*args: Array) -> Array:
    return (function(*args) * args[0]).sum()

  run = (
    jax.jit(jax.value_and_grad(objective, (0, 1, 2)) if backward else function)
    .lower(*args)
    .compile()
  )

  def once() -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start

  tries = 1 if min(once(), once()) > 1 else 3  # what takes seconds shows little noise
  return lambda: min(once() for _ in range(tries))


def rows(peer: bool) -> dict[str, Function]:
  """name -> function, one for each dispatcher and the capacity that it knows."""
  configs = {
    'dense_matmul, all experts': DispatchConfig('dense_matmul'),
    f'dense_matmul, capacity {CAPACITY}': DispatchConfig('dense_matmul', CAPACITY),
  }
  configs |= {name: DispatchConfig(name) for name in DISPATCHERS if name != 'dense_matmul'}
  functions: dict[str, Function] = {
    n: functools.partial(dispatched, cfg=c) for n, c in configs.items()
  }
  return functions | ({'peer: jax.lax.ragged_dot': ragged_dot} if peer else {})


def measure(num_experts: int, backward: bool, rounds: int, peer: bool) -> dict[str, list[float]]:
  """name -> its ratio to the dense MLP in each round, and BASE -> its milliseconds."""
  dense_args, args = inputs(num_experts)
  dense = compiled(dense_mlp, dense_args, backward)
  timers = {name: compiled(function, args, backward) for name, function in rows(peer).items()}
  results: dict[str, list[float]] = {BASE: [], **{name: [] for name in timers}}
  for _ in range(rounds):
    base = second(dense)
    results[BASE].append(1e3 * base)
    for name, timer in timers.items():
      results[name].append(second(timer) / base)
  return results


def second(timer: Callable[[], float]) -> float:
  """The second of two calls: the first one finds the memory as another row left it, which no training step does."""
  timer()
  return timer()


def cell(values: list[float], form: str) -> str:
  """Median and range."""
  return f'{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})'


def main() -> None:
  """Prints one table for the forward pass and one for forward and backward."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--experts', type=int, nargs='+', default=[8, 32, 64])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument(
    '--peer', action='store_true', help='also jax.lax.ragged_dot: on CPU it takes minutes'
  )
  args, console = parser.parse_args(), Console(width=110)
  uneven = {}
  for num_experts in args.experts:
    logits = inputs(num_experts)[1][1]
    ids = route(logits, jnp.zeros(num_experts), RouterConfig(num_experts, K)).expert_ids
    counts = expert_load(ids, jnp.ones((B, S), bool), num_experts)
    uneven[num_experts] = float(counts.max() / counts.mean()) - 1
  violations = ', '.join(f'{v:.2f} at E={e}' for e, v in uneven.items())
  console.print(
    f'D {D}, F {F}, T {B * S}, K {K}, float32, {jax.default_backend()}, JAX {jax.__version__}'
  )
  console.print(f'MaxVio {violations}; median (least - most) of {args.rounds} rounds')
  for backward in (False, True):
    columns = [measure(e, backward, args.rounds, args.peer) for e in args.experts]
    title = 'forward and backward' if backward else 'forward'
    table = Table(title, *(f'E={e}' for e in args.experts))
    for name in columns[0]:
      label, form = (
        (f'{name}: ratio', '.2f') if name != BASE else (f'{BASE}, active FLOPs: ms', '.1f')
      )
      table.add_row(label, *(cell(c[name], form) for c in columns))
    console.print(table)


if __name__ == '__main__':
  # As train.py does: glibc reads it when a process starts, and each call maps the gradients of all experts anew.
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.execve(
      sys.executable,
      [sys.executable, *sys.orig_argv[1:]],
      os.environ | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
    )
  main()
