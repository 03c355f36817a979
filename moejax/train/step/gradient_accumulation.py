"""The gradient of the whole batch's objective, a micro-batch at a time, as if it had never been cut.

  batch -> A parts -> (what losses must know of sets that span parts) -> gradient of each part -> their sum

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


def split_micro_batches(batch: Batch, micro_batches: int) -> Batch:
  """Rows in A contiguous parts. [B, ...] -> [A, B / A, ...].

  A device's rows of the batch are neighbours, of few parts. They are spread here, as integers, and not as activations.
  """

  def parts(a: Array) -> Array:
    return constrain(a.reshape(micro_batches, -1, *a.shape[1:]), '', 'batch', *[''] * (a.ndim - 1))

  return jax.tree.map(parts, batch)


def nothing_seen(names: dict[str, int], like: Array) -> Terms:
  """Zeros for each loss."""
  return {name: jnp.zeros_like(like) for name in names}


def whole_sets(
  state: TrainState, parts: Batch, rows: Array, key: Array | None, cfg: ExperimentConfig
) -> Terms:
  """Before any gradient, what losses must know of sets that span micro-batches. loss -> [A, L, E].

  'exact': from a forward pass that only counts. 'lagged': from the step before. 'buffer': nothing yet.
  """
  spans = spanning(cfg)
  if cfg.balance.accumulation == 'lagged':
    return {name: jnp.repeat(state.lagged[name], n, axis=0) for name, n in spans.items()}
  if cfg.balance.accumulation == 'buffer' or not spans:
    return {name: jnp.zeros((cfg.micro_batches, *state.router.bias.shape)) for name in spans}
  some = nothing_seen(
    spans, state.router.bias
  )  # any will do: what is seen does not depend on the losses

  def count(part: tuple[Batch, Array]) -> Terms:
    draws = None if key is None else Draws(key, part[1])
    return state.model(part[0], state.router.bias, whole=some, draws=draws).aux.whole

  counted = jax.lax.map(count, (parts, rows))
  return {name: jnp.repeat(pooled(counted[name], n), n, axis=0) for name, n in spans.items()}


def pooled(seen: Array, parts_in_set: int) -> Array:
  """Sums over the micro-batches of each set. [A, L, E] -> [sets, L, E]."""
  return seen.reshape(-1, parts_in_set, *seen.shape[1:]).sum(1)


class Gradients(NamedTuple):
  """Of the whole batch."""

  grads: Transformer
  sums: Sums
  seen: Terms  # loss -> [sets, L, E], the truth about sets that span micro-batches
  gaps: Terms  # loss -> scalar, how far the f that was used is from it


def gradients(state: TrainState, batch: Batch, cfg: ExperimentConfig) -> Gradients:
  """Gradient of the objective over the whole batch, and its terms."""
  parts = split_micro_batches(batch, cfg.micro_batches)
  rows = jnp.arange(cfg.batch_size).reshape(cfg.micro_batches, -1)
  key = (
    jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    if cfg.model.moe.router.random
    else None
  )
  spans, running = spanning(cfg), cfg.balance.accumulation == 'buffer'
  differentiate = jax.grad(objective(key, coefficients(cfg, state.step), cfg), has_aux=True)
  xs = MicroBatch(
    parts,
    part_scales(parts, cfg.model.mtp_depth, cfg),
    whole_sets(state, parts, rows, key, cfg),
    rows,
  )

  def one(part: MicroBatch) -> tuple[tuple[Transformer, Sums], Terms]:
    grads, (sums, seen) = differentiate(state.model, state.router.bias, part)
    return (grads, sums), seen

  first = jax.tree.map(lambda a: a[0], xs)
  if cfg.micro_batches == 1:
    return Gradients(*one(first)[0], {}, {})

  def body(carry: tuple, x: tuple[Array, MicroBatch]) -> tuple[tuple, tuple[Terms, Terms]]:
    (grads, sums), buffer = carry
    index, part = x
    if running:
      buffer = {name: jnp.where(index % n == 0, 0.0, buffer[name]) for name, n in spans.items()}
      part = part._replace(whole=buffer)
    (more, more_sums), seen = one(part)
    buffer = jax.tree.map(jnp.add, buffer, seen)
    used = buffer if running else part.whole
    return ((jax.tree.map(jnp.add, grads, more), add_terms(sums, more_sums)), buffer), (seen, used)

  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first)[0])
  start = zero, nothing_seen(spans, state.router.bias)
  ((grads, sums), _), (seen, used) = jax.lax.scan(body, start, (jnp.arange(cfg.micro_batches), xs))
  truth = {name: pooled(seen[name], n) for name, n in spans.items()}
  gaps = {name: f_gap(used[name], jnp.repeat(truth[name], n, axis=0)) for name, n in spans.items()}
  return Gradients(grads, sums, truth, gaps)


def f_gap(used: Array, truth: Array) -> Array:
  """Mean of |f - f of the whole set| over experts, layers and micro-batches; f is 1 at balance. [A, L, E] each."""
  f, exact = (a.shape[-1] * a / positive(a.sum(-1, keepdims=True)) for a in (used, truth))
  return jnp.abs(f - exact).mean()
