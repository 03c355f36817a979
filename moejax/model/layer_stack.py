"""The layers of a model, run by scans: layers that are alike are compiled once, however many.

Layers differ in their blocks, dense or with experts, and in their windows, which are static. The
model's layers are cut into runs in which these repeat. A run is one scan; one iteration of it, a
turn, holds as many layers as they have a period. A model of n equal layers is one run of n turns of
one layer; experts in every second layer are one run of n / 2 turns of two.

Parameters are one stack for each kind of block, whatever the runs are: [L, ...] by depth. A run
that takes a part of a stack takes a copy of it, so that a pattern which does not repeat costs
memory traffic beside compile time.

Letters: B batch, S sequence, D model, L layers of a stack, n turns of a run, p layers in a turn.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model.config import ModelConfig
from moejax.model.kv_cache import KVCache
from moejax.model.layer_runs import LayerRun, layer_runs
from moejax.model.remat import checkpointed
from moejax.moe.layer import MoEAux

Tree = TypeVar('Tree')

# 'layers' -> a cache for each place in the turns of all runs, one run after the other, of n layers;
# 'mtp' -> a cache for each depth
Caches = dict[str, tuple[KVCache, ...]]
# (x, a layer, its window, its cache) -> x, the cache, and what the layer gives besides
Body = Callable[[Array, object, int, KVCache | None], tuple[Array, KVCache | None, MoEAux | None]]


class LayerStack(NamedTuple):
  """The blocks of one kind: how one of them is run, and all of them."""

  body: Body
  layers: object  # whatever `body` takes as a layer, stacked [L, ...]


class LayersOutput(NamedTuple):
  """What the layers of a model give."""

  x: Array  # [B, S, D] the residual
  caches: Caches | None  # of all layers, without those of multi-token prediction
  aux: MoEAux  # of the layers with experts, by depth, [L, ...]


def run_layers(
  x: Array, stacks: Mapping[str, LayerStack], *, caches: Caches | None, cfg: ModelConfig
) -> LayersOutput:
  """Runs all layers of a model, one `jax.lax.scan` for each run of `layer_runs`.

  Args:
    x: [B, S, D], the residual.
    stacks: of `stack_layers`.
    caches: from `empty_caches`; None: without.
    cfg: of the model. Each layer runs under its remat policy.
  """
  done = dict.fromkeys(stacks, 0)  # layers of each stack that have run
  given, taken, auxes = [], 0, []
  for run in layer_runs(cfg):
    layers = {}
    for stack, per_turn in run.layers_per_turn.items():
      first = done[stack]
      done[stack] += run.turns * per_turn
      layers[stack] = in_turns(stacks[stack].layers, first, run.turns, per_turn)
    run_caches = None
    if caches:
      run_caches = caches['layers'][taken : taken + len(run.turn)]
      taken += len(run.turn)
    bodies = {stack: stacks[stack].body for stack in layers}
    x, run_caches, aux = scan_run(run, bodies, x, layers, caches=run_caches, cfg=cfg)
    given += run_caches or ()
    auxes += [] if aux is None else [aux]
  aux = auxes[0] if len(auxes) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
  return LayersOutput(x, {'layers': tuple(given)} if caches else None, aux)


def in_turns(layers: Tree, first: int, turns: int, per_turn: int) -> Tree:
  """Takes layers `first` on of a stack, [L, ...] -> [n, layers in a turn, ...].

  No axis of 1 for one layer in a turn: XLA's CPU backend would copy all parameters, to lay that
  axis elsewhere.
  """
  taken = jax.tree.map(lambda a: a[first : first + turns * per_turn], layers)
  if per_turn == 1:
    return taken
  return jax.tree.map(lambda a: a.reshape(turns, per_turn, *a.shape[1:]), taken)


def scan_run(
  run: LayerRun,
  bodies: Mapping[str, Body],
  x: Array,
  layers: Mapping[str, object],
  *,
  caches: tuple[KVCache, ...] | None,
  cfg: ModelConfig,
) -> tuple[Array, tuple[KVCache, ...] | None, MoEAux | None]:
  """Runs the turns of one run; arguments and results are as of `run_layers`, of this run alone."""
  per_turn = run.layers_per_turn

  def turn(carry: tuple, inputs: tuple) -> tuple[tuple, MoEAux | None]:
    x, turn_caches = carry
    number, turn_layers = inputs
    outputs, seen = [], dict.fromkeys(per_turn, 0)
    for i, (stack, window) in enumerate(run.turn):

      def run_layer(
        x: Array,
        layer: object,
        cache: KVCache | None,
        body: Body = bodies[stack],
        window: int = window,
      ) -> tuple:
        return body(x, layer, window, cache)

      layer = turn_layers[stack]
      if per_turn[stack] > 1:
        layer = layer_of(layer, seen[stack])
      seen[stack] += 1
      # In turn n the layer of this place is the n-th that its cache holds.
      cache = None if turn_caches is None else turn_caches[i]._replace(layer=number)
      x, cache, output = checkpointed(run_layer, cfg.remat)(x, layer, cache)
      outputs += [] if output is None else [output]
      if turn_caches is not None:
        turn_caches = (*turn_caches[:i], cache, *turn_caches[i + 1 :])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *outputs) if outputs else None
    return (x, turn_caches), stacked

  numbers = None if caches is None else jnp.arange(run.turns)
  (x, caches), aux = jax.lax.scan(
    turn, (x, caches), (numbers, layers), unroll=max(1, cfg.unroll // len(run.turn))
  )
  # [n, layers with experts in a turn, ...] -> [their number, ...]
  return x, caches, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)


def layer_of(tree: Tree, index: int) -> Tree:
  """Takes one layer from a tree of stacked arrays, [L, ...] -> [...]."""
  return jax.tree.map(lambda a: a[index], tree)


def mtp_window(depth: int, cfg: ModelConfig) -> int:
  """The window of a depth of multi-token prediction, whose layers are counted after the model's."""
  windows = cfg.attention.windows
  return windows[(cfg.num_layers + depth) % len(windows)]
