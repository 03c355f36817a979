"""What is minimised: LM loss by task, balance losses, z-loss, multi-token prediction, each with its
coefficient.

  one micro-batch, and what its terms are multiplied by -> its part of the objective, and all else
  that micro-batches add up to

Every term is divided by a count of the *whole* batch (tokens, documents, sets of rows), known from
masks before the first micro-batch is differentiated. So the parts simply add: value and gradient do
not depend on how the batch is cut. The value of a term that is logged is the value that is
differentiated, its coefficient left out.

Letters: A micro-batches, B batch, b rows of a micro-batch, S sequence, D model, V vocab, E experts,
L MoE layers, R tasks.
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
  load: Array  # [L, E] i32
  dropped: Array  # [L] f32, copies dropped, of the `stats.copies` that there were
  seen: Array  # [L, ...], what the bias rule observes
  stats: Stats  # [L, ...]


def add_terms(a: Sums, b: Sums) -> Sums:
  """The sums of two micro-batches together."""
  # Not all of Stats adds up: of the largest logit the larger one is taken.
  return jax.tree.map(jnp.add, a, b)._replace(stats=add(a.stats, b.stats))


def coefficients(cfg: ExperimentConfig, step: Array) -> Terms:
  """Each term's coefficient at a step, by its name in the log. Scalars f32."""
  schedules = {'z_loss': cfg.loss.z_coef, 'mtp_loss': cfg.loss.mtp_coef}
  for name in cfg.balance.active():
    schedules[f'balance/{name}'] = cfg.balance.losses[name]
  return {name: piecewise(schedule, cfg.steps)(step) for name, schedule in schedules.items()}


def task_weights(cfg: ExperimentConfig) -> Array:
  """The weight of each task's tokens, 1 where the config names none. [R] f32."""
  named = cfg.loss.task_weights
  return jnp.array([named[task] if task in named else 1.0 for task in cfg.data.tasks], jnp.float32)


def token_weights(batch: Batch, cfg: ExperimentConfig) -> Array:
  """The weight of each token's loss, 0 where nothing is to be predicted. [..., B, S].

  The LM loss is the sum of weighted losses over the sum of these weights in the whole batch.
  """
  return batch.mask * task_weights(cfg)[batch.task_ids][..., None]


def sum_by_task(values: Array, batch: Batch, cfg: ExperimentConfig) -> Array:
  """Sums over each task's tokens that are to be predicted. [B, S] -> [R] f32."""
  return jnp.zeros(len(cfg.data.tasks)).at[batch.task_ids].add((batch.mask * values).sum(-1))


class Scales(NamedTuple):
  """What each micro-batch's terms are multiplied by so that they add up."""

  # [A, depths + 1], one over the token weights of the whole batch, of the next token and of those
  # that multi-token prediction reaches; the same for all parts
  tokens: Array
  balance: Terms  # balance loss -> [A], the part's share of it, see `micro_batch_shares`


def part_scales(parts: Batch, depth: int, cfg: ExperimentConfig) -> Scales:
  """The scales of the micro-batches, from masks alone.

  Args:
    parts: the whole batch, [A, b, S].
    depth: how many tokens further on multi-token prediction reaches; 0 without it.
  """
  valid = parts.segment_ids > 0
  per_token = [
    1.0 / positive(token_weights(targets_ahead(parts, d), cfg).sum()) for d in range(depth + 1)
  ]
  shares = {}
  for name, scope in cfg.balance.scopes(cfg.batch_size, cfg.micro_batches).items():
    shares[name] = micro_batch_shares(name, valid, parts.segment_ids, scope)
  return Scales(jnp.broadcast_to(jnp.stack(per_token), (len(valid), depth + 1)), shares)


def positive(count: Array) -> Array:
  """The count, or 1 instead of 0, to divide by: what is divided is then 0, too."""
  return jnp.where(count > 0, count, 1.0)


def targets_ahead(batch: Batch, depth: int) -> Batch:
  """The batch with targets `depth` tokens further on, IGNORE where the document ends before."""
  if not depth:
    return batch

  def shifted(a: Array, fill: int) -> Array:
    return jnp.pad(a[..., depth:], [(0, 0)] * (a.ndim - 1) + [(0, depth)], constant_values=fill)

  same_document = shifted(batch.segment_ids, 0) == batch.segment_ids
  targets = jnp.where(same_document, shifted(batch.targets, IGNORE), IGNORE)
  return batch._replace(targets=targets, mask=targets != IGNORE)


class DepthLoss(NamedTuple):
  """The loss of the predictions so many tokens further on."""

  objective: Array  # scalar, with its coefficients
  mean_nll: Array  # scalar, the weighted mean over the whole batch, this part's share of it
  z_loss: Array  # scalar, the same of log_z^2, times the depth's coefficient
  nll: Array  # [B, S] f32, unweighted


class LMTerms(NamedTuple):
  """What the language model's part of the objective is made of."""

  objective: Array  # scalar, with all coefficients
  terms: Terms  # lm_loss, z_loss and, with multi-token prediction, mtp_loss
  nll: Array  # [R] f32, of each task's tokens, unweighted


def lm_terms(
  hidden: tuple[Array, ...],
  head: Array,
  batch: Batch,
  scale: Array,
  coefs: Terms,
  cfg: ExperimentConfig,
) -> LMTerms:
  """Cross entropy and z-loss of the next token, and lambda/D times those of D depths after it.

  The mean over depths and lambda, the coefficient of mtp_loss, are DeepSeek-V3 eq. 24 and 25.

  Args:
    hidden: [b, S, D] of the model, then of each depth of multi-token prediction.
    head: [D, V].
    scale: [depths + 1], see `Scales.tokens`.
    coefs: see `coefficients`.
  """

  def loss_at(depth: int, share: Array | float) -> DepthLoss:
    ahead = targets_ahead(batch, depth)
    weights = token_weights(ahead, cfg) * scale[depth]
    h, z_coef = hidden[depth], coefs['z_loss']
    objective, parts = cross_entropy(
      h, head, ahead.targets, weights * share, z_coef, chunks=cfg.loss.chunks
    )
    mean_nll = (weights * parts.nll).sum()
    z_loss = share * (weights * jnp.square(parts.log_z)).sum()
    return DepthLoss(objective, mean_nll, z_loss, parts.nll)

  main = loss_at(0, 1.0)
  nll = sum_by_task(main.nll, batch, cfg)
  total, z_loss, terms = main.objective, main.z_loss, {'lm_loss': main.mean_nll}
  depths = len(hidden) - 1
  if depths:
    terms['mtp_loss'] = jnp.zeros(())
  for depth in range(1, depths + 1):
    further = loss_at(depth, coefs['mtp_loss'] / depths)
    total = total + further.objective
    terms['mtp_loss'] += further.mean_nll / depths
    z_loss = z_loss + further.z_loss
  return LMTerms(total, terms | {'z_loss': z_loss}, nll)


def balance_terms(aux: MoEAux, shares: Terms, coefs: Terms) -> tuple[Array, Terms]:
  """The balance losses' part of the objective, and each of them by its name in the log.

  A loss is the mean over MoE layers: the one declared reduction of layers. Layers are not pooled
  before: two that collapse onto opposite experts would look balanced together.
  """
  terms = {f'balance/{name}': shares[name] * values.mean() for name, values in aux.losses.items()}
  return sum((coefs[name] * value for name, value in terms.items()), jnp.zeros(())), terms


class MicroBatch(NamedTuple):
  """All that a part of the objective is made from, besides the parameters."""

  batch: Batch
  scale: Scales  # its own, without A
  whole: Terms  # loss -> [L, E], see `Transformer.__call__`
  rows: Array  # [b] i32, their numbers in the global batch


class ForwardPass(NamedTuple):
  """The two parts of the objective, and what else one micro-batch tells."""

  lm: Array  # scalar, the language model's part of the objective
  balance: Array  # scalar, the balance losses' part
  sums: Sums
  set_counts: Terms  # loss -> [L, E], what the micro-batch saw of its set


def forward(
  model: Transformer,
  bias: Array,
  part: MicroBatch,
  key: Array | None,
  coefs: Terms,
  cfg: ExperimentConfig,
) -> ForwardPass:
  """One micro-batch through the model and all losses.

  Args:
    bias: [L, E] f32, the router bias.
    key: of the step, what routers draw from; None: nothing is random.
    coefs: see `coefficients`.
  """
  draws = None if key is None else Draws(key, part.rows)
  out = model(part.batch, bias, whole=part.whole, draws=draws)
  hidden, head = (out.hidden, *out.mtp_hidden), model.head_weights()
  lm = lm_terms(hidden, head, part.batch, part.scale.tokens, coefs=coefs, cfg=cfg)
  balance, more = balance_terms(out.aux, part.scale.balance, coefs)
  sums = Sums(
    loss=lm.objective + balance,
    terms=lm.terms | more,
    nll=lm.nll,
    load=out.aux.load,
    dropped=out.aux.dropped * out.aux.stats.copies,
    seen=out.aux.seen,
    stats=out.aux.stats,
  )
  return ForwardPass(lm.objective, balance, sums, out.aux.whole)


Objective = Callable[[Transformer, Array, MicroBatch], tuple[Array, tuple[Sums, Terms]]]


def objective(key: Array | None, coefs: Terms, cfg: ExperimentConfig) -> Objective:
  """(model, router bias [L, E], micro-batch) -> its part of the objective, and (sums, set counts).

  What `jax.grad(has_aux=True)` takes. `key` and `coefs` are those of `forward`.
  """

  def objective_of(
    model: Transformer, bias: Array, part: MicroBatch
  ) -> tuple[Array, tuple[Sums, Terms]]:
    result = forward(model, bias, part, key, coefs=coefs, cfg=cfg)
    return result.sums.loss, (result.sums, result.set_counts)

  return objective_of
