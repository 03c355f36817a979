"""Which layers of a model are alike, and which one scan runs.

config -> stack_layers: the layers whose parameters are one stack
       -> layer_runs: the layers that one scan runs

Letters: L layers of a stack.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.model.config import ModelConfig

STACKS = {False: 'dense_blocks', True: 'blocks'}  # has a layer experts -> its stack of blocks


class LayerKind(NamedTuple):
  """What is static of a layer: layers of one kind are compiled as one."""

  stack: str  # a value of STACKS
  window: int


class LayerRun(NamedTuple):
  """Consecutive layers that one scan runs."""

  turn: tuple[LayerKind, ...]  # the layers of one iteration
  turns: int

  @property
  def layers_per_turn(self) -> dict[str, int]:
    """Stack -> how many of its layers are in a turn, of the stacks that are in it."""
    stacks = [kind.stack for kind in self.turn]
    return {stack: stacks.count(stack) for stack in stacks}


def stack_layers(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Stack of blocks -> which layers of the model it holds, ascending; no stack without a layer."""
  numbers: dict[str, list[int]] = {stack: [] for stack in STACKS.values()}
  for layer, has_experts in enumerate(cfg.has_experts):
    numbers[STACKS[has_experts]].append(layer)
  return {stack: tuple(layers) for stack, layers in numbers.items() if layers}


def by_depth(parts: Mapping[str, Array], cfg: ModelConfig) -> Array:
  """Puts the layers of all stacks, stack -> [L of it, ...], into the order of the model."""
  stacks = stack_layers(cfg)
  places = np.argsort(np.concatenate([stacks[stack] for stack in parts]))
  return jnp.concatenate([*parts.values()])[places]


@functools.lru_cache
def layer_runs(cfg: ModelConfig) -> tuple[LayerRun, ...]:
  """Cuts the layers of a model into runs, of which the fewest layers have to be compiled."""
  windows = cfg.attention.windows
  return repeated_runs(
    [
      LayerKind(STACKS[has_experts], windows[layer % len(windows)])
      for layer, has_experts in enumerate(cfg.has_experts)
    ]
  )


def repeated_runs(kinds: Sequence[LayerKind]) -> tuple[LayerRun, ...]:
  """Cuts a sequence into runs of equal turns whose turns have the fewest layers in all.

  Of cuts that are equal in that, the one with the fewest runs is taken.
  """
  count = len(kinds)
  # By the place where the rest of the sequence begins: layers in turns, number of runs, the runs.
  best: dict[int, tuple[int, int, tuple[LayerRun, ...]]] = {count: (0, 0, ())}
  for start in reversed(range(count)):
    candidates = []
    for period in range(1, count - start + 1):
      turn = tuple(kinds[start : start + period])
      end = start
      while tuple(kinds[end : end + period]) == turn:
        end += period
        layers, runs, later = best[end]
        run = LayerRun(turn, (end - start) // period)
        candidates.append((layers + period, runs + 1, (run, *later)))
    best[start] = min(candidates, key=lambda candidate: candidate[:2])
  return best[0][2]
