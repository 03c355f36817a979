"""How a mistake is made: what a mutant is, and functions that replace parts of moejax.

A function is replaced in every module that has imported its name, the face of a package never:
nothing inside looks there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import pytest
from jax import Array

from moejax.model.transformer import Output, Transformer
from moejax.moe import layer, routing
from moejax.train.step import gradient_accumulation, objective, train_step
from moejax.train.step.train_state import TrainState

Patch = pytest.MonkeyPatch


class Mutant(NamedTuple):
  """A mistake, and who must find it."""

  apply: Callable[[Patch], None]
  line: str  # of the certificate, that must fail

  @property
  def description(self) -> str:
    """What the mistake is, in a line."""
    return self.apply.__doc__.strip().splitlines()[0]


def change_routing(
  patch: Patch, change: Callable[[routing.Routing, Array, routing.RouterConfig], routing.Routing]
) -> None:
  """Every routing changed after the fact."""
  route = routing.route

  def changed(
    logits: Array, bias: Array, cfg: routing.RouterConfig, *rest: object
  ) -> routing.Routing:
    return change(route(logits, bias, cfg, *rest), bias, cfg)

  for module in (routing, layer):
    patch.setattr(module, 'route', changed)


def change_row(patch: Patch, rows: dict, name: str, **changes: object) -> None:
  """A row of a registry with other fields."""
  patch.setitem(rows, name, rows[name]._replace(**changes))


def change_output(patch: Patch, change: Callable[[Transformer, Output], Output]) -> None:
  """Every forward pass changed after the fact."""
  call = Transformer.__call__

  def changed(self: Transformer, *args: object, **named: object) -> Output:
    return change(self, call(self, *args, **named))

  patch.setattr(Transformer, '__call__', changed)


def wrap(patch: Patch, name: str, make: Callable[[Callable], Callable], *modules: object) -> None:
  """A function replaced in all these modules by what `make` makes of it."""
  changed = make(getattr(modules[0], name))
  for module in modules:
    patch.setattr(module, name, changed)


def change_grads(patch: Patch, change: Callable[[str, Array], Array]) -> None:
  """Every leaf of the gradient changed, by its path."""

  def make(gradients: Callable) -> Callable:
    def changed(*args: object) -> gradient_accumulation.Gradients:
      found = gradients(*args)
      return found._replace(grads=map_leaves(change, found.grads))

    return changed

  wrap(patch, 'gradients', make, train_step)


def map_leaves(change: Callable[[str, Array], Array], tree: object) -> object:
  """A tree with every leaf changed, by its path."""

  def of_leaf(keys: tuple, leaf: Array) -> Array:
    return change(jax.tree_util.keystr(keys, simple=True, separator='/'), leaf)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def change_step(
  patch: Patch, change: Callable[[TrainState, TrainState, dict], tuple[TrainState, dict]]
) -> None:
  """Every step changed after the fact: (before, after, metrics) -> after, metrics."""

  def make(take: Callable) -> Callable:
    def changed(before: TrainState, *rest: object) -> tuple[TrainState, dict]:
      return change(before, *take(before, *rest))

    return changed

  wrap(patch, 'train_step', make, train_step)


def change_sums(patch: Patch, change: Callable[[objective.Sums, objective.Sums], dict]) -> None:
  """What two micro-batches add up to, with some fields made of the two in another way."""

  def make(add: Callable) -> Callable:
    def changed(a: objective.Sums, b: objective.Sums) -> objective.Sums:
      return add(a, b)._replace(**change(a, b))

    return changed

  wrap(patch, 'add_terms', make, gradient_accumulation)


def change_loss(patch: Patch, registry: dict, name: str, change: Callable[..., Array]) -> None:
  """A balance loss whose value is (loss, routing, mask, segments, scope) -> scalar."""
  loss = registry[name].value

  def value(*args: object) -> Array:
    return change(loss, *args)

  change_row(patch, registry, name, value=value)
