"""Seconds on an accelerator, and the shapes that are measured.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.moe.experts.weights import Weights

ROUNDS, CALLS = 7, 5


class Shape(NamedTuple):
  """The experts of one layer, and the tokens that come to them."""

  name: str
  T: int
  K: int
  D: int
  F: int
  E: int

  @property
  def forward_flops(self) -> float:
    """Of three products for each copy."""
    return 6.0 * self.T * self.K * self.D * self.F


SHAPES = (
  Shape('Mixtral-8x7B', T=16384, K=2, D=4096, F=14336, E=8),
  Shape('OLMoE-1B-7B', T=16384, K=8, D=2048, F=1024, E=64),
  Shape('Qwen3-30B-A3B', T=16384, K=8, D=2048, F=768, E=128),
  # 8 of 256 experts on a device, which get a copy of every fourth token of their group.
  Shape('DeepSeek-V3, 1 of 32', T=16384, K=1, D=7168, F=2048, E=8),
)
TINY = (Shape('tiny', T=24, K=2, D=32, F=16, E=4),)
EVEN, ZIPF = 0.0, 1.0  # exponents of the experts' odds


def routing(shape: Shape, exponent: float) -> np.ndarray:
  """Expert ids [T, K], drawn without repetition with odds 1 / rank^exponent."""
  rng = np.random.default_rng(0)
  odds = -exponent * np.log(np.arange(1, shape.E + 1))
  gumbel = rng.gumbel(size=(shape.T, shape.E))
  return np.argsort(-(odds + gumbel), axis=1)[:, : shape.K].astype(np.int32)


def draw(shape: Shape, dtype: jnp.dtype) -> tuple[Array, Array, Array, Weights]:
  """x and dy [T, D], the copies' weights [T, K], and the experts: random, of a layer's scale."""
  keys = jax.random.split(jax.random.key(0), 6)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def normal(key: Array, dims: tuple[int, ...], fan_in: int) -> Array:
    return (jax.random.normal(key, dims, jnp.float32) * fan_in**-0.5).astype(dtype)

  wide, narrow = (shape.E, shape.D, shape.F), (shape.E, shape.F, shape.D)
  weights = Weights(
    gate=normal(keys[0], wide, shape.D),
    up=normal(keys[1], wide, shape.D),
    down=normal(keys[2], narrow, shape.F),
  )
  x, dy = normal(keys[3], (shape.T, shape.D), 1), normal(keys[4], (shape.T, shape.D), 1)
  copy_weights = jax.random.uniform(keys[5], (shape.T, shape.K), jnp.float32, 0.1, 1.0)
  return x, dy, copy_weights, weights


def seconds(function: Callable[..., object], *arguments: object, quick: bool = False) -> float:
  """Median seconds of a call, of some that follow one another without a pause."""
  run = jax.jit(function)
  for _ in range(2):
    jax.block_until_ready(run(*arguments))
  rounds, calls = (1, 1) if quick else (ROUNDS, CALLS)
  taken = []
  for _ in range(rounds):
    start = time.perf_counter()
    # All are kept until the last is done: a device runs them one after the other.
    results = [run(*arguments) for _ in range(calls)]
    jax.block_until_ready(results[-1])
    taken.append((time.perf_counter() - start) / calls)
  return statistics.median(taken)


@functools.cache
def dense_ceiling(quick: bool) -> float:
  """FLOP/s of a dense product of random bfloat16 numbers: what the card gives, not its rating."""
  n = 128 if quick else 8192
  a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
  return 2.0 * n**3 / seconds(jnp.matmul, a, a, quick=quick)


def say(line: str) -> None:
  """Prints a line at once: what is measured is kept if the machine goes away."""
  print(line, flush=True)
