"""What is minimised: LM loss by task, balance losses, z-loss and multi-token prediction, each with its coefficient.

  one micro-batch, and what its terms are divided by -> its part of the objective, and everything else that adds up

Every term is divided by a count of the *whole* batch (tokens, documents, sets of rows), known from masks before the
first micro-batch is differentiated. So the parts simply add: value and gradient do not depend on how the batch is cut.
The value of a term that is logged is the value that is differentiated, its coefficient left out.

Letters: A micro-batches, B batch, b rows of a micro-batch, S sequence, E experts, L MoE layers, R tasks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config.schedule import piecewise
from moejax.data.batch import IGNORE, Batch
from moejax.model.cross_entropy import cross_entropy
from moejax.model.transformer import Draws, Transformer
from moejax.moe.balance.losses import micro_batch_shares
from moejax.moe.layer import MoEAux
from moejax.moe.statistics import Stats, add
from moejax.train.experiment.config import ExperimentConfig

Terms = dict[str, Array]


class Sums(NamedTuple):
  """What micro-batches add up to."""

  loss: Array  # the objective: what is differentiated
  terms: Terms  # its terms, by the names they are logged under, coefficients left out
  nll: Array  # [R] f32, of each task's tokens, unweighted
  load: Array  # [L, E] f32
  dropped: Array  # [L] f32, the fraction dropped, by tokens
  seen: Array  # [L, ...], what the bias rule observes
  stats: Stats  # [L, ...]


def add_terms(a: Sums, b: Sums) -> Sums:
  """Of two micro-batches together."""
  return jax.tree.map(jnp.add, a, b)._replace(stats=add(a.stats, b.stats))


def coefficients(cfg: ExperimentConfig, step: Array) -> Terms:
  """Term -> its coefficient at a step, f32."""
  schedules = {'z_loss': cfg.loss.z_coef, 'mtp_loss': cfg.loss.mtp_coef} | {
    f'balance/{name}': cfg.balance.losses[name] for name in cfg.balance.active()
  }
  return {name: piecewise(schedule, cfg.steps)(step) for name, schedule in schedules.items()}


def task_weights(cfg: ExperimentConfig) -> Array:
  """The weight of each task's tokens, [R] f32."""
  named = cfg.loss.task_weights
  return jnp.array([named[task] if task in named else 1.0 for task in cfg.data.tasks], jnp.float32)


def token_weights(batch: Batch, cfg: ExperimentConfig) -> Array:
  """What each token's loss is multiplied by, before division by the sum of these over the whole batch. [..., B, S]."""
  return batch.mask * task_weights(cfg)[batch.task_ids][..., None]


def sum_by_task(values: Array, batch: Batch, cfg: ExperimentConfig) -> Array:
  """Sums over each task's tokens that are predicted. [B, S] -> [R] f32."""
  return jnp.zeros(len(cfg.data.tasks)).at[batch.task_ids].add((batch.mask * values).sum(-1))


def part_scales(parts: Batch, depth: int, cfg: ExperimentConfig) -> Terms:
  """What each micro-batch's terms are multiplied by, from masks alone: term -> [A, ...] f32. depth: of MTP."""
  valid = parts.segment_ids > 0
  by_tokens = valid.sum((1, 2)) / jnp.maximum(valid.sum(), 1)
  per_token = [
    1.0 / positive(token_weights(targets_ahead(parts, d), cfg).sum()) for d in range(depth + 1)
  ]
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  return {
    'tokens': jnp.broadcast_to(jnp.stack(per_token), (len(valid), depth + 1)),
    'load': by_tokens,
  } | {
    name: micro_batch_shares(name, valid, parts.segment_ids, scope)
    for name, scope in scopes.items()
  }


def positive(count: Array) -> Array:
  """1 instead of 0: nothing is divided by it then."""
  return jnp.where(count > 0, count, 1.0)


def targets_ahead(batch: Batch, depth: int) -> Batch:
  """Targets `depth` tokens further on, of the same document; where there is none, nothing is predicted."""
  if not depth:
    return batch

  def shifted(a: Array, fill: int) -> Array:
    return jnp.pad(a[..., depth:], [(0, 0)] * (a.ndim - 1) + [(0, depth)], constant_values=fill)

  targets = jnp.where(
    shifted(batch.segment_ids, 0) == batch.segment_ids, shifted(batch.targets, IGNORE), IGNORE
  )
  return batch._replace(targets=targets, mask=targets != IGNORE)


def lm_terms(
  hidden: tuple[Array, ...],
  head: Array,
  batch: Batch,
  scale: Array,
  coefs: Terms,
  cfg: ExperimentConfig,
) -> tuple[Array, Terms, Array]:
  """Cross entropy and z-loss of hidden[0], and lambda/D times that of D depths after it (DeepSeek-V3 eq. 24, 25).

  -> the part of the objective, its terms, and each task's unweighted nll [R]. scale: [D + 1], see `part_scales`.
  """
  total, depths = jnp.zeros(()), len(hidden) - 1
  terms = {'lm_loss': total, 'z_loss': total} | ({'mtp_loss': total} if depths else {})
  for depth, h in enumerate(hidden):
    seen = targets_ahead(batch, depth)
    weights = token_weights(seen, cfg) * scale[depth]
    share = coefs['mtp_loss'] / depths if depth else 1.0
    loss, parts = cross_entropy(
      h, head, seen.targets, weights * share, coefs['z_loss'], cfg.loss.chunks
    )
    total = total + loss
    mean = (weights * parts.nll).sum()
    if depth:
      terms['mtp_loss'] += mean / depths
    else:
      terms['lm_loss'] = mean
      nll = sum_by_task(parts.nll, batch, cfg)
    terms['z_loss'] += share * (weights * jnp.square(parts.log_z)).sum()
  return total, terms, nll


def balance_terms(aux: MoEAux, scale: Terms, coefs: Terms) -> tuple[Array, Terms]:
  """Balance losses, the mean over MoE layers: the one declared reduction of layers."""
  terms = {f'balance/{name}': scale[name] * values.mean() for name, values in aux.losses.items()}
  return sum((coefs[name] * value for name, value in terms.items()), jnp.zeros(())), terms


class MicroBatch(NamedTuple):
  """All that a part of the objective is made from, besides the parameters."""

  batch: Batch
  scale: Terms  # see `part_scales`
  whole: Terms  # loss -> [L, E], see `Transformer.__call__`
  rows: Array  # [b] i32, their numbers in the global batch


def forward(
  model: Transformer,
  router: Array,
  part: MicroBatch,
  key: Array | None,
  coefs: Terms,
  cfg: ExperimentConfig,
) -> tuple[Array, Array, Sums, Terms]:
  """-> the LM part and the balance part of the objective, all that adds up, and loss -> [L, E] seen of its set."""
  out = model(
    part.batch, router, whole=part.whole, draws=None if key is None else Draws(key, part.rows)
  )
  hidden = (out.hidden, *out.mtp_hidden)
  lm, terms, nll = lm_terms(
    hidden, model.head_weights(), part.batch, part.scale['tokens'], coefs, cfg
  )
  balance, more = balance_terms(out.aux, part.scale, coefs)
  sums = Sums(
    lm + balance,
    terms | more,
    nll,
    out.aux.load,
    part.scale['load'] * out.aux.dropped,
    out.aux.seen,
    out.aux.stats,
  )
  return lm, balance, sums, out.aux.whole


Objective = Callable[[Transformer, Array, MicroBatch], tuple[Array, tuple[Sums, Terms]]]


def objective(key: Array | None, coefs: Terms, cfg: ExperimentConfig) -> Objective:
  """(model, router [L, E], micro-batch) -> its part of the objective, for `jax.grad(has_aux=True)`."""

  def of(model: Transformer, router: Array, part: MicroBatch) -> tuple[Array, tuple[Sums, Terms]]:
    _, _, sums, seen = forward(model, router, part, key, coefs, cfg)
    return sums.loss, (sums, seen)

  return of
