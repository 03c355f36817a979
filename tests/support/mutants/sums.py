"""Sums over layers, micro-batches and tokens that count twice, or leave out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.model.transformer import Output, Transformer
from moejax.moe import layer
from moejax.train.step import gradient_accumulation, objective, train_step
from moejax.train.step.train_state import TrainState
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_output,
  change_step,
  change_sums,
  wrap,
)


def statistics_twice_under_remat(patch: Patch) -> None:
  """Sums for statistics count recomputed tokens twice."""

  def twice(model: Transformer, out: Output) -> Output:
    times = 1 if model.cfg.remat == 'none' else 2
    stats = jax.tree.map(lambda a: times * a, out.aux.stats)
    return out._replace(aux=out.aux._replace(stats=stats))

  change_output(patch, twice)


def pairs_twice_under_remat(patch: Patch) -> None:
  """Pairs of experts are counted twice where layers are recomputed."""

  def twice(model: Transformer, out: Output) -> Output:
    times = 1 if model.cfg.remat == 'none' else 2
    stats = out.aux.stats._replace(pairs=times * out.aux.stats.pairs)
    return out._replace(aux=out.aux._replace(stats=stats))

  change_output(patch, twice)


def dropped_by_rows(patch: Patch) -> None:
  """Micro-batches weigh the dropped fraction evenly, however much padding they have."""

  def change(model: object, out: object) -> object:
    # A fraction is made a number of copies by the copies that there are: here, by room for all.
    room = out.aux.expert_ids[0].size
    copies = jnp.maximum(out.aux.stats.copies, 1)
    return out._replace(aux=out.aux._replace(dropped=out.aux.dropped * room / copies))

  change_output(patch, change)


def dropped_of_the_last(patch: Patch) -> None:
  """The dropped fraction is that of the last micro-batch."""
  change_sums(patch, lambda a, b: {'dropped': b.dropped})


def load_of_the_last(patch: Patch) -> None:
  """The load is that of the last micro-batch."""
  change_sums(patch, lambda a, b: {'load': b.load})


def seen_of_the_last(patch: Patch) -> None:
  """The bias rule sees the last micro-batch alone."""
  change_sums(patch, lambda a, b: {'seen': b.seen})


def statistics_of_the_last(patch: Patch) -> None:
  """Statistics are those of the last micro-batch."""
  change_sums(patch, lambda a, b: {'stats': b.stats})


def peaks_added(patch: Patch) -> None:
  """The largest logits of micro-batches are added up."""
  change_sums(patch, lambda a, b: {'stats': jax.tree.map(jnp.add, a.stats, b.stats)})


def change_layer_mean(patch: Patch, mean: Callable[[Array], Array]) -> None:
  """Layers of a balance loss reduced by another function."""

  def make(terms: Callable) -> Callable:
    def changed(aux: layer.MoEAux, *rest: object) -> tuple[Array, dict]:
      losses = {name: mean(values) for name, values in aux.losses.items()}
      return terms(aux._replace(losses=losses), *rest)

    return changed

  wrap(patch, 'balance_terms', make, objective)


def divided_by_all_layers(patch: Patch) -> None:
  """A model with a dense layer divides by that one, too."""
  change_layer_mean(patch, lambda v: v.sum() / (len(v) + (len(v) > 2)))


def mean_without_mtp(patch: Patch) -> None:
  """The mean over layers leaves out those of multi-token prediction."""
  change_layer_mean(patch, lambda v: v[:2].mean())


def sum_over_layers(patch: Patch) -> None:
  """Layers are added up."""
  change_layer_mean(patch, lambda v: v.sum())


def worst_layer(patch: Patch) -> None:
  """The largest layer stands for all."""
  change_layer_mean(patch, lambda v: v.max())


def f_gap_of_sums(patch: Patch) -> None:
  """The gap of f is that of counts."""
  patch.setattr(gradient_accumulation, 'f_gap', lambda used, truth: jnp.abs(used - truth).mean())


def f_gap_largest(patch: Patch) -> None:
  """The gap of f is its largest entry."""

  def f_of(counts: Array) -> Array:
    return counts.shape[-1] * counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)

  patch.setattr(
    gradient_accumulation, 'f_gap', lambda used, truth: jnp.abs(f_of(used) - f_of(truth)).max()
  )


def lagged_never_updated(patch: Patch) -> None:
  """The counts of the step before are those of the first step."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    first = before.step == 0
    kept = jax.tree.map(lambda new, old: jnp.where(first, new, old), after.lagged, before.lagged)
    return after._replace(lagged=kept), metrics

  change_step(patch, change)


def lagged_added_up(patch: Patch) -> None:
  """The counts of the step before are those of all steps."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return after._replace(lagged=jax.tree.map(jnp.add, after.lagged, before.lagged)), metrics

  change_step(patch, change)


def last_part_of_a_set(patch: Patch) -> None:
  """A set is what its last micro-batch holds."""

  def last(counts: Array, parts_in_set: int) -> Array:
    return parts_in_set * counts.reshape(-1, parts_in_set, *counts.shape[1:])[:, -1]

  patch.setattr(gradient_accumulation, 'sum_over_sets', last)


def sets_in_turn(patch: Patch) -> None:
  """Sets are dealt out to micro-batches in turn, not in runs."""
  repeat = jnp.repeat

  class Numbers:
    """jax.numpy with another repeat."""

    def __getattr__(self, name: str) -> object:
      return getattr(jnp, name)

    @staticmethod
    def repeat(a: Array, n: int, axis: int = 0) -> Array:
      return jnp.concatenate([a] * n, axis) if isinstance(n, int) else repeat(a, n, axis)

  patch.setattr(gradient_accumulation, 'jnp', Numbers())


def nll_of_all_places(patch: Patch) -> None:
  """The mean of the loss divides by padding, too."""

  def tokens(batch: object, cfg: object) -> Array:
    return jnp.array([batch.mask.size], jnp.float32)

  patch.setattr(train_step, 'task_tokens', tokens)


def padding_in_statistics(patch: Patch) -> None:
  """Statistics are of padding, too."""

  def make(observe: Callable) -> Callable:
    return lambda routed, ids, mask: observe(routed, ids, jnp.ones_like(mask))

  wrap(patch, 'observe', make, layer)


def change_statistic(patch: Patch, function: str, change: Callable[[dict], dict]) -> None:
  """Some statistics of layers, made from the right ones."""

  def make(statistics: Callable) -> Callable:
    def changed(*args: object) -> dict:
      found = statistics(*args)
      return found | change(found)

    return changed

  wrap(patch, function, make, train_step)


def max_vio_of_shares(patch: Patch) -> None:
  """max_vio is the largest load over the mean, and not what is above it."""
  change_statistic(patch, 'layer_statistics', lambda found: {'max_vio': found['max_vio'] + 1})


def entropy_in_bits(patch: Patch) -> None:
  """The router's entropy is in bits."""
  change_statistic(
    patch,
    'token_statistics',
    lambda found: {'router_entropy': found['router_entropy'] / np.log(2)},
  )


def price_of_all_experts(patch: Patch) -> None:
  """The price of balance is 0 whatever is overridden."""
  change_statistic(
    patch, 'token_statistics', lambda found: {'price_of_balance': 0 * found['margin']}
  )


SUMS: dict[str, Mutant] = {
  'statistics twice under remat': Mutant(statistics_twice_under_remat, 'metrics'),
  'pairs twice under remat': Mutant(pairs_twice_under_remat, 'metrics'),
  'dropped weighed by rows': Mutant(dropped_by_rows, 'metrics'),
  'dropped of the last micro-batch': Mutant(dropped_of_the_last, 'metrics'),
  'load of the last micro-batch': Mutant(load_of_the_last, 'metrics'),
  'bias sees the last micro-batch': Mutant(seen_of_the_last, 'bias'),
  'statistics of the last micro-batch': Mutant(statistics_of_the_last, 'metrics'),
  'peaks added up': Mutant(peaks_added, 'metrics'),
  'divided by all layers': Mutant(divided_by_all_layers, 'layers'),
  'mean without MTP': Mutant(mean_without_mtp, 'layers'),
  'sum over layers': Mutant(sum_over_layers, 'layers'),
  'worst layer': Mutant(worst_layer, 'layers'),
  'f_gap of counts': Mutant(f_gap_of_sums, 'metrics'),
  'f_gap of the largest': Mutant(f_gap_largest, 'metrics'),
  'lagged counts never updated': Mutant(lagged_never_updated, 'metrics'),
  'lagged counts added up': Mutant(lagged_added_up, 'metrics'),
  'last part of a set': Mutant(last_part_of_a_set, 'metrics'),
  'sets in turn': Mutant(sets_in_turn, 'invariance'),
  'loss over padding': Mutant(nll_of_all_places, 'metrics'),
  'padding in statistics': Mutant(padding_in_statistics, 'metrics'),
  'max_vio with its 1': Mutant(max_vio_of_shares, 'metrics'),
  'entropy in bits': Mutant(entropy_in_bits, 'metrics'),
  'balance for nothing': Mutant(price_of_all_experts, 'metrics'),
}
