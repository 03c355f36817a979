"""Tile sizes of each kernel, timed on the card: what the tables of triton/tiles.py should hold."""

import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import jax.numpy as jnp
from jax import Array

from benchmarks.gpu_parts.timing import EVEN, SHAPES, TINY, Shape, draw, routing, say, seconds
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.residuals import PreActivations
from moejax.moe.experts.sorted_copies import Copies, sort_copies
from moejax.moe.experts.triton.hidden_gradient import hidden_gradient
from moejax.moe.experts.triton.outer_products import outer_products
from moejax.moe.experts.triton.products import gate_up, rows_times_matrix
from moejax.moe.experts.triton.tiles import HALF_TILES, TileSizes

SWIGLU = ACTIVATIONS['swiglu'](0.0)
SHOWN = 3


def candidates(kernel: str) -> Iterator[TileSizes]:
  """Tiles around the one in the table: 24 of them, so that all kernels take five minutes."""
  if kernel == 'outer_products':
    sizes = itertools.product((32, 64), (64, 128, 256), (64, 128), (4, 8), (3,))
  else:
    sizes = itertools.product((64, 128), (64, 128, 256), (64,), (4, 8), (3, 4))
  yield from (TileSizes(*size) for size in sizes)


def runs(shape: Shape) -> dict[str, Callable[[], tuple[Callable[..., object], tuple]]]:
  """kernel -> a function of arrays that runs it, and the arrays."""
  x, dy, w, weights = draw(shape, jnp.bfloat16)
  copies: Copies = sort_copies(jnp.asarray(routing(shape, EVEN)), w, shape.E)
  hidden = jnp.ones((shape.T * shape.K, shape.F), jnp.bfloat16)
  pre = PreActivations(hidden, hidden)

  def up(x: Array) -> object:
    return gate_up(x, copies, weights, SWIGLU)

  def down(hidden: Array) -> object:
    return rows_times_matrix(((hidden, weights.down),), copies, is_weighted=True)

  def back(dy: Array) -> object:
    return hidden_gradient(dy, copies, weights.down, pre, SWIGLU)

  def outer(x: Array) -> object:
    return outer_products(x, hidden, copies, gather_a=True)

  return {
    'gate_up': (up, (x,)),
    'rows_times_matrix': (down, (hidden,)),
    'hidden_gradient': (back, (dy,)),
    'outer_products': (outer, (x,)),
  }


def main(quick: bool) -> None:
  """Prints the fastest tiles of each kernel at each shape; what does not compile is passed over."""
  for shape in TINY if quick else SHAPES[:2]:  # wide experts, and narrow ones
    for kernel, (run, arguments) in runs(shape).items():
      tried = [HALF_TILES[kernel]] if quick else [HALF_TILES[kernel], *candidates(kernel)]
      taken: dict[TileSizes, float] = {}
      for tile in tried:
        with mock.patch.dict(HALF_TILES, {kernel: tile}):
          try:
            # Another function each time: a trace of the last tile must not be found.
            taken[tile] = seconds(lambda *a, run=run: run(*a), *arguments, quick=quick)
          except Exception as error:  # too much shared memory, or too many registers
            say(f'tune      {shape.name} {kernel} {tuple(tile)}: {str(error)[:80]!r}')
      now = taken[HALF_TILES[kernel]]
      for tile in sorted(taken, key=taken.get)[:SHOWN]:
        gain = now / taken[tile]
        took = f'{1e3 * taken[tile]:.3f} ms'
        say(f'tune      {shape.name:21} {kernel:18} {tuple(tile)} {took}, {gain:.2f} of the table')
