"""A stack of layers that are alike, run by one scan: compiled once, whatever their number.

Attention windows may alternate by layer and are static. So one iteration of the scan, a turn, holds
as many layers as the windows have a period.

Letters: B batch, S sequence, D model, L layers of a stack, p layers in a turn of the scan.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model.config import REMAT_POLICIES, ModelConfig
from moejax.model.kv_cache import KVCache
from moejax.moe.layer import MoEAux

Tree = TypeVar('Tree')

# stack of blocks -> a cache for each place in a turn of the scan, of L / p layers; under 'mtp', a
# cache for each depth
Caches = dict[str, tuple[KVCache, ...]]
# (x, a layer, its window, its cache) -> x, the cache, and what the layer gives besides
Body = Callable[[Array, object, int, KVCache | None], tuple[Array, KVCache | None, MoEAux | None]]


class StackOutput(NamedTuple):
  """What a stack of blocks gives."""

  x: Array  # [B, S, D] the residual
  caches: tuple[KVCache, ...] | None
  aux: MoEAux | None  # [L, ...]; None of dense blocks


def run_stack(
  stack: str, body: Body, x: Array, layers: object, *, caches: Caches | None, cfg: ModelConfig
) -> StackOutput:
  """Runs a stack of blocks by `jax.lax.scan`, p layers in a turn, each under the remat policy.

  Args:
    stack: its name, of `stack_sizes`.
    body: runs one layer.
    x: [B, S, D], the residual.
    layers: whatever `body` takes as a layer, stacked [L, ...].
    caches: of all stacks; None: without.
  """
  windows = turn_windows(stack, cfg)
  period = len(windows)

  def turn(carry: tuple, inputs: tuple) -> tuple[tuple, object]:
    x, turn_caches = carry
    number, turn_layers = inputs
    outputs = []
    for i, window in enumerate(windows):

      def run_layer(x: Array, layer: object, cache: KVCache | None, window: int = window) -> tuple:
        return body(x, layer, window, cache)

      if cfg.remat != 'none':
        run_layer = jax.checkpoint(run_layer, policy=REMAT_POLICIES[cfg.remat])
      layer = turn_layers if period == 1 else layer_of(turn_layers, i)
      # In turn n the layer of this place is the n-th that its cache holds.
      cache = None if turn_caches is None else turn_caches[i]._replace(layer=number)
      x, cache, output = run_layer(x, layer, cache)
      outputs.append(output)
      if turn_caches is not None:
        turn_caches = (*turn_caches[:i], cache, *turn_caches[i + 1 :])
    return (x, turn_caches), jax.tree.map(lambda *a: jnp.stack(a), *outputs)

  turns, numbers, stack_caches = layers, None, None
  if period > 1:
    # No axis of 1 for a period of 1: XLA's CPU backend would copy all parameters, to lay that axis
    # elsewhere.
    turns = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), layers)
  if caches:
    stack_caches, numbers = caches[stack], jnp.arange(stack_sizes(cfg)[stack] // period)
  (x, stack_caches), aux = jax.lax.scan(
    turn, (x, stack_caches), (numbers, turns), unroll=max(1, cfg.unroll // period)
  )
  # [L / p, p, ...] -> [L, ...]
  return StackOutput(x, stack_caches, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux))


def layer_of(tree: Tree, index: int) -> Tree:
  """Takes one layer from a tree of stacked arrays, [L, ...] -> [...]."""
  return jax.tree.map(lambda a: a[index], tree)


def stack_sizes(cfg: ModelConfig) -> dict[str, int]:
  """Stack of blocks -> its layers, in the order in which they run."""
  sizes = {'dense_blocks': cfg.num_dense_layers, 'blocks': cfg.num_layers - cfg.num_dense_layers}
  return {name: size for name, size in sizes.items() if size}


def turn_windows(stack: str, cfg: ModelConfig) -> tuple[int, ...]:
  """The window of each layer in a turn of the scan.

  A turn is a period of the windows, or the whole stack at once where that does not divide it.
  """
  windows, count = cfg.attention.windows, stack_sizes(cfg)[stack]
  first = cfg.num_dense_layers if stack == 'blocks' else 0  # layer of the model
  period = len(windows) if count % len(windows) == 0 else count
  return tuple(windows[(first + i) % len(windows)] for i in range(period))


def mtp_window(depth: int, cfg: ModelConfig) -> int:
  """The window of a depth of multi-token prediction, whose layers are counted after the model's."""
  windows = cfg.attention.windows
  return windows[(cfg.num_layers + depth) % len(windows)]
