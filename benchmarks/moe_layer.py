"""What does an expert layer cost beside one dense MLP of equal active FLOPs, by each dispatcher?

  python -m benchmarks.moe_layer [--experts 8 32 64] [--rounds 7] [--peer] [--quick]

The load is uneven, as a router's is. Each round times every row and takes its ratio to the dense
MLP of that round, so that a machine that slows down slows both; printed are the median ratio and
its range over rounds.
Letters: B batch, S sequence, D model, F FFN hidden, E experts, K experts per token, T = B * S,
N = T * K.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

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

K = 2
CAPACITY = 1.25
BASE = 'one dense MLP'
Inputs = tuple[Array, Array, Weights]  # x [B, S, D], logits [B, S, E], experts
Function = Callable[[Array, Array, Weights], Array]  # -> y [B, S, D]


class Size(NamedTuple):
  """How much goes through a layer, and how wide it is."""

  B: int = 8
  S: int = 256
  D: int = 256
  F: int = 512


SMALLEST = Size(2, 16, 16, 16)


def dense_mlp(x: Array, logits: Array, weights: Weights) -> Array:
  """One MLP of hidden size K * F: what every token would cost if there was nothing to choose.

  Tokens are in one axis: on CPU, XLA's gradient to a matrix takes two to three times as long with
  two of them.
  """
  del logits
  tokens = x.reshape(-1, x.shape[-1])
  return (swiglu(tokens @ weights.gate, tokens @ weights.up) @ weights.down).reshape(x.shape)


def dispatched(x: Array, logits: Array, weights: Weights, cfg: DispatchConfig) -> Array:
  """Routing and dispatch, as the layer does them."""
  routing = route(logits, jnp.zeros(logits.shape[-1]), RouterConfig(logits.shape[-1], K))
  return DISPATCHERS[cfg.dispatcher](x, routing, weights, swiglu, cfg)[0]


def ragged_dot(x: Array, logits: Array, weights: Weights) -> Array:
  """The peer: JAX's own grouped matmul over sorted copies, with a gather before it and a scatter
  after it."""
  num_experts, tokens = logits.shape[-1], x.reshape(-1, x.shape[-1])
  routing: Routing = route(logits, jnp.zeros(num_experts), RouterConfig(num_experts, K))
  ids, combine = routing.expert_ids.reshape(-1, K), routing.weights.reshape(-1, K)
  copies = sort_copies(ids, combine, num_experts)
  rows = tokens[copies.tokens]
  hidden = swiglu(*(jax.lax.ragged_dot(rows, w, copies.load) for w in (weights.gate, weights.up)))
  out = jax.lax.ragged_dot(hidden, weights.down, copies.load) * copies.weights[:, None]
  return jnp.zeros_like(tokens).at[copies.tokens].add(out).reshape(x.shape)


def inputs(num_experts: int, size: Size) -> tuple[Inputs, Inputs]:
  """What the dense MLP gets, and what the experts get: logits that favour some experts."""
  keys = jax.random.split(jax.random.key(0), 9)
  B, S, D, F = size

  def normal(key: Array, *shape: int) -> Array:
    return jax.random.normal(key, shape) * 0.02

  x = jax.random.normal(keys[0], (B, S, D))
  logits = jax.random.normal(keys[1], (B, S, num_experts))
  logits += 0.5 * jax.random.normal(keys[2], (num_experts,))
  dense = Weights(normal(keys[3], D, K * F), normal(keys[4], D, K * F), normal(keys[5], K * F, D))
  experts = Weights(
    normal(keys[6], num_experts, D, F),
    normal(keys[7], num_experts, D, F),
    normal(keys[8], num_experts, F, D),
  )
  return (x, logits, dense), (x, logits, experts)


def compiled(function: Function, args: Inputs, backward: bool) -> Callable[[], float]:
  """A call that gives the seconds of the best of three; the gradient is to x, logits and all
  weights."""

  def objective(*args: Array) -> Array:
    return (function(*args) * args[0]).sum()

  measured = jax.value_and_grad(objective, (0, 1, 2)) if backward else function
  run = jax.jit(measured).lower(*args).compile()

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
  functions: dict[str, Function] = {}
  for name, cfg in configs.items():
    functions[name] = functools.partial(dispatched, cfg=cfg)
  return functions | ({'peer: jax.lax.ragged_dot': ragged_dot} if peer else {})


def measure(
  num_experts: int, size: Size, backward: bool, options: argparse.Namespace
) -> dict[str, list[float]]:
  """name -> its ratio to the dense MLP in each round, and BASE -> its milliseconds."""
  dense_args, args = inputs(num_experts, size)
  dense = compiled(dense_mlp, dense_args, backward)
  functions = rows(options.peer)
  timers = {name: compiled(function, args, backward) for name, function in functions.items()}
  results: dict[str, list[float]] = {BASE: [], **{name: [] for name in timers}}
  for _ in range(options.rounds):
    base = second(dense)
    results[BASE].append(1e3 * base)
    for name, timer in timers.items():
      results[name].append(second(timer) / base)
  return results


def second(timer: Callable[[], float]) -> float:
  """The second of two calls: the first one finds the memory as another row left it, which no
  training step does."""
  timer()
  return timer()


def cell(values: list[float], form: str) -> str:
  """Median and range."""
  return f'{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})'


def max_violation(num_experts: int, size: Size) -> float:
  """MaxVio of the load that the inputs make: its largest over its mean, minus one."""
  logits = inputs(num_experts, size)[1][1]
  ids = route(logits, jnp.zeros(num_experts), RouterConfig(num_experts, K)).expert_ids
  counts = expert_load(ids, jnp.ones(logits.shape[:2], bool), num_experts)
  return float(counts.max() / counts.mean()) - 1


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
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args, console = parser.parse_args(), Console(width=110)
  size = SMALLEST if args.quick else Size()
  if args.quick:
    args.experts, args.rounds = [4], 1
  violations = ', '.join(f'{max_violation(e, size):.2f} at E={e}' for e in args.experts)
  backend = f'{jax.default_backend()}, JAX {jax.__version__}'
  console.print(f'D {size.D}, F {size.F}, T {size.B * size.S}, K {K}, float32, {backend}')
  console.print(f'MaxVio {violations}; median (least - most) of {args.rounds} rounds')
  for backward in (False, True):
    columns = [measure(e, size, backward, args) for e in args.experts]
    title = 'forward and backward' if backward else 'forward'
    table = Table(title, *(f'E={e}' for e in args.experts))
    for name in columns[0]:
      is_base = name == BASE
      label = f'{BASE}, active FLOPs: ms' if is_base else f'{name}: ratio'
      table.add_row(label, *(cell(c[name], '.1f' if is_base else '.2f') for c in columns))
    console.print(table)


if __name__ == '__main__':
  # As train.py does: glibc reads it when a process starts, and each call maps the gradients of all
  # experts anew.
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.execve(
      sys.executable,
      [sys.executable, *sys.orig_argv[1:]],
      os.environ | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
    )
  main()
