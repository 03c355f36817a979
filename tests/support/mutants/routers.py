"""Choices, weights, probabilities and balance losses that are not their equations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe import layer, routing, selection, token_sets
from moejax.moe.balance import aux_loss, losses
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.losses import BALANCE_LOSSES, CODEBASES
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.selection import SELECTIONS, Tokens
from moejax.moe.token_sets import Scope
from moejax.train.step import objective
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_loss,
  change_routing,
  change_row,
  wrap,
)


def scale_dropped(patch: Patch) -> None:
  """Weights leave out the router's scale."""
  change_routing(patch, lambda found, bias, cfg: found._replace(weights=found.weights / cfg.scale))


def bias_inside_weights(patch: Patch) -> None:
  """The chosen experts are weighed by the biased scores."""

  def change(found: Routing, bias: Array, cfg: RouterConfig) -> Routing:
    return found._replace(weights=found.weights * jnp.exp(bias)[found.expert_ids % len(bias)])

  change_routing(patch, change)


def outside_groups_zero(patch: Patch) -> None:
  """Experts outside the best groups have the choice 0, not minus infinity."""

  def make(limit: Callable) -> Callable:
    def changed(*args: object) -> Array:
      choice = limit(*args)
      return jnp.where(jnp.isneginf(choice), 0.0, choice)

    return changed

  wrap(patch, 'limit_to_groups', make, selection, routing)


def groups_by_their_best(patch: Patch) -> None:
  """A group is worth its best expert, and not its best two."""

  def make(limit: Callable) -> Callable:
    return lambda choice, groups, top, best: limit(choice, groups, top, 1)

  wrap(patch, 'limit_to_groups', make, selection, routing)


def ties_to_the_last(patch: Patch) -> None:
  """Ties go to the highest expert."""

  def choose(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
    return choice.shape[-1] - 1 - jax.lax.top_k(choice[..., ::-1], top_k)[1]

  change_row(patch, SELECTIONS, 'top_k', choose=choose)


def hash_of_places(patch: Patch) -> None:
  """Hash routing goes by the place in the row, not by the token."""
  choose = SELECTIONS['hash'].choose

  def changed(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
    places = jnp.broadcast_to(jnp.arange(tokens.ids.shape[1]), tokens.ids.shape)
    return choose(log_scores, choice, tokens._replace(ids=places), top_k)

  change_row(patch, SELECTIONS, 'hash', choose=changed)


def sinkhorn_of_the_batch(patch: Patch) -> None:
  """Sinkhorn routing counts padding."""
  choose = SELECTIONS['sinkhorn'].choose

  def changed(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
    return choose(log_scores, choice, tokens._replace(mask=jnp.ones_like(tokens.mask)), top_k)

  change_row(patch, SELECTIONS, 'sinkhorn', choose=changed)


def expert_choice_quota(patch: Patch) -> None:
  """Expert choice takes as many tokens as the row is long, padding included."""
  choose = SELECTIONS['expert_choice'].choose

  def changed(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
    full = tokens._replace(mask=jnp.ones_like(tokens.mask))
    return choose(log_scores, choice, full, top_k)

  change_row(patch, SELECTIONS, 'expert_choice', choose=changed)


def f_of_dispatched(patch: Patch) -> None:
  """f counts what was dispatched where it should count the unbiased choice."""
  patch.setitem(ASSIGNMENTS, 'unbiased', lambda found: found.expert_ids)


def gshard_of_all(patch: Patch) -> None:
  """GShard's f counts both choices."""
  patch.setitem(ASSIGNMENTS, 'first', lambda found: found.expert_ids)


def documents_by_length(patch: Patch) -> None:
  """A batch of documents is the mean over its tokens."""

  def change(loss: Callable, *args: object) -> Array:
    found, mask, segments, scope = args
    return aux_loss.row_sets_loss(found, mask, segments, scope._replace(rows=0))

  change_loss(patch, BALANCE_LOSSES, 'sequence', change)


def rows_for_documents(patch: Patch) -> None:
  """A packed row is one document."""

  def change(loss: Callable, *args: object) -> Array:
    found, mask, segments, scope = args
    return loss(found, mask, (segments > 0).astype(segments.dtype), scope)

  change_loss(patch, BALANCE_LOSSES, 'sequence', change)


def groups_of_every_fourth_row(patch: Patch) -> None:
  """Expert-parallel groups are dealt out row by row, not in runs."""

  def sums(values: Array, rows: int) -> Array:
    sets = max(1, values.shape[0] // rows) if rows else 1
    return values.reshape(-1, sets, *values.shape[1:]).sum((0, 2))

  for module in (token_sets, aux_loss):
    patch.setattr(module, 'row_sums', sums)


def mean_over_all_documents(patch: Patch) -> None:
  """The mean over documents divides by those without a token, too."""

  def change(loss: Callable, *args: object) -> Array:
    found, mask, segments, scope = args
    used = (token_sets.document_sums(mask[..., None] * 1.0, segments) > 0).sum()
    every = (token_sets.document_sums((segments > 0)[..., None] * 1.0, segments) > 0).sum()
    return loss(*args) * used / jnp.maximum(every, 1)

  change_loss(patch, BALANCE_LOSSES, 'sequence', change)


def partition_by_mean(patch: Patch) -> None:
  """Balance of groups multiplies by the mean of a group's P, not by its sum."""

  def change(loss: Callable, *args: object) -> Array:
    found, mask, segments, scope = args
    value = loss(*args)
    return value * scope.partition / found.probs.shape[-1] if scope.partition else value

  change_loss(patch, BALANCE_LOSSES, 'global_batch', change)


def router_z_unsquared(patch: Patch) -> None:
  """The router's z-loss is the mean of |logsumexp|."""

  def change(loss: Callable, found: Routing, mask: Array, *rest: object) -> Array:
    size = jnp.abs(jax.nn.logsumexp(found.logits, axis=-1))
    return (size * mask).sum() / jnp.maximum(mask.sum(), 1)

  change_loss(patch, BALANCE_LOSSES, 'router_z', change)


def simbal_to_zero(patch: Patch) -> None:
  """SimBal pulls the Gram matrix to 0, not to the identity."""

  def change(loss: Callable, found: Routing, *rest: object) -> Array:
    return jnp.abs(found.router.T @ found.router).sum()

  change_loss(patch, BALANCE_LOSSES, 'simbal', change)


def importance_not_squared(patch: Patch) -> None:
  """Importance is the coefficient of variation, not its square."""
  change_loss(
    patch, BALANCE_LOSSES, 'importance', lambda loss, *args: jnp.sqrt(loss(*args) + 1e-12)
  )


def importance_of_a_sample(patch: Patch) -> None:
  """Importance has the sample's variance: E - 1 for E."""

  def change(loss: Callable, found: Routing, *rest: object) -> Array:
    experts = found.probs.shape[-1]
    return loss(found, *rest) * experts / (experts - 1)

  change_loss(patch, BALANCE_LOSSES, 'importance', change)


def megatron_as_ours(patch: Patch) -> None:
  """Megatron's coefficient is taken as it is, though it sums over layers."""
  patch.setitem(CODEBASES, 'megatron', lambda top_k, layers: 1)


def shares_by_rows(patch: Patch) -> None:
  """Micro-batches weigh evenly in every loss."""

  def shares(name: str, mask: Array, segments: Array, scope: Scope) -> Array:
    return jnp.ones(len(mask)) / len(mask)

  for module in (losses, objective):
    patch.setattr(module, 'micro_batch_shares', shares)


def centred_over_the_row(patch: Patch) -> None:
  """Tokens choose by how far their scores are above the mean of their row."""

  def choose(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
    return jax.lax.top_k(choice - choice.mean(1, keepdims=True), top_k)[1]

  change_row(patch, SELECTIONS, 'top_k', choose=choose)


def softmax_over_chosen(patch: Patch) -> None:
  """P is the softmax of the scores, whatever the score function is."""

  def change(found: Routing, bias: Array, cfg: RouterConfig) -> Routing:
    return found._replace(probs=jax.nn.softmax(found.scores))

  change_routing(patch, change)


def sharper_p(patch: Patch) -> None:
  """P is normalised after it was squared."""

  def change(found: Routing, bias: Array, cfg: RouterConfig) -> Routing:
    return found._replace(probs=jax.nn.softmax(2 * jnp.log(found.probs + 1e-30)))

  change_routing(patch, change)


def raw_sigmoid(patch: Patch) -> None:
  """P is the raw score, not normalised."""
  change_routing(patch, lambda found, bias, cfg: found._replace(probs=found.scores))


def padding_has_a_loss(patch: Patch) -> None:
  """P is averaged over padding, too."""

  def change(loss: Callable, *args: object) -> Array:
    found, mask, segments, scope = args
    return loss(found, jnp.ones_like(mask), segments, scope)

  change_loss(patch, BALANCE_LOSSES, 'global_batch', change)


def padding_is_dispatched(patch: Patch) -> None:
  """Padding goes to experts and counts in the load."""

  def make(load: Callable) -> Callable:
    return lambda ids, mask, n: load(ids, jnp.ones_like(mask), n)

  wrap(patch, 'expert_load', make, token_sets, layer)


ROUTERS: dict[str, Mutant] = {
  'scale dropped': Mutant(scale_dropped, 'oracle'),
  'bias inside the weights': Mutant(bias_inside_weights, 'oracle'),
  'experts outside of groups at 0': Mutant(outside_groups_zero, 'oracle'),
  'groups by their best': Mutant(groups_by_their_best, 'oracle'),
  'ties to the last': Mutant(ties_to_the_last, 'oracle'),
  'hash of places': Mutant(hash_of_places, 'oracle'),
  'Sinkhorn counts padding': Mutant(sinkhorn_of_the_batch, 'oracle'),
  'expert choice counts padding': Mutant(expert_choice_quota, 'oracle'),
  'f of what was dispatched': Mutant(f_of_dispatched, 'oracle'),
  'GShard counts both choices': Mutant(gshard_of_all, 'oracle'),
  'documents by length': Mutant(documents_by_length, 'padding'),
  'rows for documents': Mutant(rows_for_documents, 'padding'),
  'groups of every fourth row': Mutant(groups_of_every_fourth_row, 'oracle'),
  'mean over empty documents': Mutant(mean_over_all_documents, 'padding'),
  'partition by the mean': Mutant(partition_by_mean, 'balance'),
  'router_z not squared': Mutant(router_z_unsquared, 'oracle'),
  'SimBal to 0': Mutant(simbal_to_zero, 'oracle'),
  'importance not squared': Mutant(importance_not_squared, 'oracle'),
  'importance of a sample': Mutant(importance_of_a_sample, 'oracle'),
  'Megatron as ours': Mutant(megatron_as_ours, 'balance'),
  'micro-batches weigh evenly': Mutant(shares_by_rows, 'invariance'),
  'centred over the row': Mutant(centred_over_the_row, 'causality'),
  'softmax of scores': Mutant(softmax_over_chosen, 'probabilities'),
  'P sharpened': Mutant(sharper_p, 'probabilities'),
  'raw scores for P': Mutant(raw_sigmoid, 'shrink'),
  'padding in P': Mutant(padding_has_a_loss, 'padding'),
  'padding in the load': Mutant(padding_is_dispatched, 'bias'),
}
