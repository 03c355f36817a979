"""The kernels against float32 products of one expert at a time, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_parts.timing import EVEN, TINY, ZIPF, Shape, draw, routing, say
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import IMPLEMENTATIONS
from moejax.moe.experts.residuals import Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Weights

# Sides that are no multiple of a tile, too.
SIZES = (
  Shape('OLMoE', T=4096, K=8, D=2048, F=1024, E=64),
  Shape('odd', T=1000, K=4, D=1440, F=720, E=32),
)
ALLOWED = {'float32': 1e-5, 'bfloat16': 2e-2}
SWIGLU = ACTIVATIONS['swiglu'](0.0)
NAMES = ('y', 'dx', 'dw', 'd_gate', 'd_up', 'd_down')


def by_kernels(ids: Array, x: Array, w: Array, weights: Weights, dy: Array) -> tuple[Array, ...]:
  """Value and gradients by the row of GPUs."""
  copies, unsort = jax.vjp(lambda w: sort_copies(ids, w, weights.gate.shape[0]).weights, w)
  copies = sort_copies(ids, w, weights.gate.shape[0])
  forward, backward = IMPLEMENTATIONS['triton']
  y, kept = forward(x, copies, weights, SWIGLU)
  found = backward(Residuals(x, copies, weights, kept), SWIGLU, dy)
  return y, found.x, unsort(found.copy_weights)[0], *found.weights[:3]


def one_by_one(ids: Array, x: Array, w: Array, weights: Weights, dy: Array) -> tuple[Array, ...]:
  """The same in float32: every expert on all tokens, and its own picked."""

  def value(x: Array, w: Array, weights: Weights) -> Array:
    def expert(y: Array, each: tuple[Array, Weights]) -> tuple[Array, None]:
      e, (gate, up, down, _) = each
      weight = jnp.where(ids == e, w, 0).sum(1)
      return y + weight[:, None] * (SWIGLU(x @ gate, x @ up) @ down), None

    numbers = jnp.arange(weights.gate.shape[0])
    return jax.lax.scan(jax.checkpoint(expert), jnp.zeros_like(x), (numbers, weights))[0]

  x, dy, weights = jax.tree.map(lambda a: a.astype(jnp.float32), (x, dy, weights))
  with jax.default_matmul_precision('float32'):
    y, pull = jax.vjp(value, x, w, weights)
    dx, dw, d_weights = pull(dy)
  return y, dx, dw, *d_weights[:3]


def main(quick: bool) -> None:
  """Prints the worst deviation of each array, as a part of its largest entry.

  Raises:
    ArithmeticError: one is larger than rounding explains, or differs from run to run.
  """
  for shape in TINY if quick else SIZES:
    for dtype, allowed in ALLOWED.items():
      for exponent in (EVEN, ZIPF):
        x, dy, w, weights = draw(shape, jnp.dtype(dtype))
        ids = jnp.asarray(routing(shape, exponent))
        run = jax.jit(functools.partial(by_kernels, ids))
        got, again = run(x, w, weights, dy), run(x, w, weights, dy)
        want = jax.jit(functools.partial(one_by_one, ids))(x, w, weights, dy)
        errors = {}
        for name, a, b in zip(NAMES, got, want):
          right = np.asarray(b, np.float64)
          errors[name] = np.abs(np.asarray(a, np.float64) - right).max() / np.abs(right).max()
        same = all(bool((a == b).all()) for a, b in zip(got, again))
        told = ' '.join(f'{name} {error:.1e}' for name, error in errors.items())
        say(f'numerics  {shape.name:8} {dtype:8} Zipf {exponent:g}: {told}; bits again: {same}')
        if not same or not max(errors.values()) <= allowed:
          raise ArithmeticError(f'{shape.name}, {dtype}: {errors}, allowed {allowed}')
