"""The gradient of the whole batch's objective, a micro-batch at a time, as if it were never cut.

  batch -> A parts -> (what losses must know of sets that span parts) -> gradient of each part
  -> their sum

Letters: A micro-batches, B batch, S sequence, E experts, L MoE layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.data.batch import Batch
from moejax.model.transformer import Draws, Transformer
from moejax.sharding.logical_axes import constrain
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.objective import (
  MicroBatch,
  Sums,
  Terms,
  add_terms,
  coefficients,
  objective,
  part_scales,
  positive,
)
from moejax.train.step.train_state import TrainState, spanning


class Gradients(NamedTuple):
  """The gradient of the whole batch, and its sums."""

  grads: Transformer
  sums: Sums
  seen: Terms  # loss -> [sets, L, E], the truth about sets that span micro-batches
  gaps: Terms  # loss -> scalar, how far the f that was used is from it


class PartGradient(NamedTuple):
  """The gradient of one micro-batch, or of those before it too, and its sums."""

  grads: Transformer
  sums: Sums


def gradients(state: TrainState, batch: Batch, cfg: ExperimentConfig) -> Gradients:
  """Gradient of the objective over the whole batch, and its terms."""
  parts = split_micro_batches(batch, cfg.micro_batches)
  # Numbers in the global batch, with which rows draw: what is random does not depend on the cut.
  rows = jnp.arange(cfg.batch_size).reshape(cfg.micro_batches, -1)
  key = None
  if cfg.model.moe.router.random:
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
  # What each part is multiplied by, and what it must know of sets that other parts share, comes
  # from the whole batch: then the gradients of the parts simply add up.
  differentiate = jax.grad(objective(key, coefficients(cfg, state.step), cfg), has_aux=True)
  micro_batches = MicroBatch(
    batch=parts,
    scale=part_scales(parts, cfg.model.mtp_depth, cfg),
    whole=whole_set_counts(state, parts, rows, key, cfg),
    rows=rows,
  )

  def gradient_of(part: MicroBatch) -> tuple[PartGradient, Terms]:
    grads, (sums, set_counts) = differentiate(state.model, state.router.bias, part)
    return PartGradient(grads, sums), set_counts

  first = jax.tree.map(lambda a: a[0], micro_batches)
  if cfg.micro_batches == 1:
    # No loop, and no zeros to begin it with.
    total, _ = gradient_of(first)
    return Gradients(total.grads, total.sums, seen={}, gaps={})

  spans, is_running = spanning(cfg), cfg.balance.accumulation == 'buffer'

  def add_part(
    carry: tuple[PartGradient, Terms], x: tuple[Array, MicroBatch]
  ) -> tuple[tuple[PartGradient, Terms], tuple[Terms, Terms]]:
    (total, buffer), (index, part) = carry, x
    if is_running:
      # A set begins: what is in the buffer is of the set before.
      buffer = {name: jnp.where(index % n == 0, 0, buffer[name]) for name, n in spans.items()}
      part = part._replace(whole=buffer)
    more, set_counts = gradient_of(part)
    buffer = jax.tree.map(jnp.add, buffer, set_counts)
    used = buffer if is_running else part.whole
    grads = jax.tree.map(jnp.add, total.grads, more.grads)
    total = PartGradient(grads, add_terms(total.sums, more.sums))
    return (total, buffer), (set_counts, used)

  # A scan, and not a vmap: the activations of one micro-batch at a time take memory.
  shapes = jax.eval_shape(gradient_of, first)
  start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  xs = jnp.arange(cfg.micro_batches), micro_batches
  (total, _), (set_counts, used) = jax.lax.scan(add_part, start, xs)
  # Only now is the whole of each set known: how far was what the losses used from it?
  truth = {name: sum_over_sets(set_counts[name], n) for name, n in spans.items()}
  gaps = {}
  for name, n in spans.items():
    gaps[name] = f_gap(used[name], jnp.repeat(truth[name], n, axis=0))
  return Gradients(total.grads, total.sums, truth, gaps)


def split_micro_batches(batch: Batch, micro_batches: int) -> Batch:
  """Rows in A contiguous parts. [B, ...] -> [A, B / A, ...].

  A device's rows of the batch are neighbours, of few parts. They are spread over the devices here,
  as integers: later they would be sent as activations, in every layer.
  """

  def split(a: Array) -> Array:
    parts = a.reshape(micro_batches, -1, *a.shape[1:])
    return constrain(parts, '', 'batch', *[''] * (a.ndim - 1))

  return jax.tree.map(split, batch)


def whole_set_counts(
  state: TrainState, parts: Batch, rows: Array, key: Array | None, cfg: ExperimentConfig
) -> Terms:
  """What losses must know of sets that span micro-batches, before any gradient.

  accumulation='exact' takes it from a forward pass that only counts, 'lagged' from the step before;
  for 'buffer' nothing is known yet, and zeros stand for it.

  Args:
    parts: the batch, [A, b, S].
    rows: [A, b] i32, their numbers in the global batch.
    key: of the step, what routers draw from; None: nothing is random.

  Returns:
    loss -> [A, L, E], for each micro-batch the counts of the set that it is a part of.
  """
  spans = spanning(cfg)
  if cfg.balance.accumulation == 'lagged':
    return {name: jnp.repeat(state.lagged[name], n, axis=0) for name, n in spans.items()}
  if cfg.balance.accumulation == 'buffer' or not spans:
    # Counts: only losses that are linear in P, whose f they are, may be summed in a buffer.
    shape = cfg.micro_batches, *state.router.bias.shape
    return {name: jnp.zeros(shape, jnp.int32) for name in spans}
  # Any counts will do here: what is seen does not depend on the losses.
  placeholder = {name: jnp.zeros_like(state.router.bias) for name in spans}

  def count(part: tuple[Batch, Array]) -> Terms:
    batch, batch_rows = part
    draws = None if key is None else Draws(key, batch_rows)
    return state.model(batch, state.router.bias, whole=placeholder, draws=draws).aux.whole

  # One micro-batch after the other, as their gradients: all at once would take A times the memory.
  counts = jax.lax.map(count, (parts, rows))
  of_sets = {}
  for name, n in spans.items():
    of_sets[name] = jnp.repeat(sum_over_sets(counts[name], n), n, axis=0)
  return of_sets


def sum_over_sets(counts: Array, parts_in_set: int) -> Array:
  """Sums over the micro-batches of each set. [A, L, E] -> [sets, L, E]."""
  return counts.reshape(-1, parts_in_set, *counts.shape[1:]).sum(1)


def f_gap(used: Array, truth: Array) -> Array:
  """Mean of |f - f of the whole set| over experts, layers and micro-batches. [A, L, E] each.

  f is an expert's share of the counts times E: 1 at balance.
  """

  def f_of(counts: Array) -> Array:
    counts = counts.astype(jnp.float32)  # int32 may not hold E times a count, nor their sum
    return counts.shape[-1] * counts / positive(counts.sum(-1, keepdims=True))

  return jnp.abs(f_of(used) - f_of(truth)).mean()
