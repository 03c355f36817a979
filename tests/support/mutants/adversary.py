"""Mistakes drawn by someone who knew the lines' names, and not what any of them compares.

Each is wrong for some configs alone: under accumulation, on a mesh, with groups, in one selection.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model import transformer
from moejax.model.transformer import Transformer
from moejax.moe import bias, bias_quantile
from moejax.moe.balance.aux_loss import assignment_counts
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BiasState
from moejax.moe.dispatch import dispatchers, exchange
from moejax.moe.dispatch.local_view import RoutedTokens
from moejax.moe.experts.residuals import FfnGradients, Residuals
from moejax.moe.experts.weights import Weights
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.token_sets import Scope
from moejax.train.step import gradient_accumulation, train_step
from moejax.train.step.train_state import TrainState
from tests.support.mutants.experts import change_implementation
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_routing,
  change_row,
  change_step,
  wrap,
)


def tied_head_detached(patch: Patch) -> None:
  """A head that is tied to the embedding gives it no gradient."""
  head_weights = Transformer.head_weights

  def changed(self: Transformer) -> Array:
    head = head_weights(self)
    return jax.lax.stop_gradient(head) if self.cfg.tie_embeddings else head

  patch.setattr(Transformer, 'head_weights', changed)


def next_document_ahead(patch: Patch) -> None:
  """Multi-token prediction looks past the end of a document: at the next one, or at padding."""

  def shifted(embedded: Array, batch: object, by: int) -> Array:
    return jnp.pad(embedded[:, by:], [(0, 0), (0, by), (0, 0)])

  patch.setattr(transformer, 'shifted', shifted)


def unbiased_across_micro_batches(patch: Patch) -> None:
  """What f counts is the config's choice within a micro-batch, and the unbiased one across them."""

  def seen(found: Routing, mask: Array, scope: Scope) -> Array:
    return assignment_counts(found, mask, scope._replace(assignment='unbiased'))

  for name in ('ep_group', 'global_batch'):
    change_row(patch, BALANCE_LOSSES, name, seen=seen)


def buffer_never_emptied(patch: Patch) -> None:
  """A running f of a set begins with the counts of the set before."""

  class Numbers:
    """jax.numpy whose `where` does not put in zeros."""

    def __getattr__(self, name: str) -> object:
      return getattr(jnp, name)

    @staticmethod
    def where(condition: Array, yes: object, no: object) -> Array:
      return no if isinstance(yes, int) else jnp.where(condition, yes, no)

  patch.setattr(gradient_accumulation, 'jnp', Numbers())


def bias_not_weighed(patch: Patch) -> None:
  """The gradient of the combine weights leaves out the experts' output bias."""

  def make(backward: Callable) -> Callable:
    def changed(residuals: Residuals, *rest: object) -> FfnGradients:
      weights: Weights = residuals.weights
      if weights.biases.down is None:
        return backward(residuals, *rest)
      biases = weights.biases._replace(down=jnp.zeros_like(weights.biases.down))
      return backward(residuals._replace(weights=weights._replace(biases=biases)), *rest)

    return changed

  change_implementation(patch, backward=make)


def dropped_by_each_shard(patch: Patch) -> None:
  """Devices along `tensor`, which see the same tokens, each count what these drop."""

  def make(expert_parallel: Callable) -> Callable:
    def changed(*args: object) -> Callable:
      run = expert_parallel(*args)

      def counted(tokens: RoutedTokens, experts: Weights) -> tuple[Array, Array]:
        y, dropped = run(tokens, experts)
        return y, dropped * jax.sharding.get_abstract_mesh().shape['tensor']

      return counted

    return changed

  wrap(patch, 'expert_parallel', make, exchange, dispatchers)


def room_by_weight(patch: Patch) -> None:
  """A full expert keeps the copies of the highest combine weights, not of the best scores."""

  def tokens(x: Array, expert_ids: Array, scores: Array, weights: Array) -> RoutedTokens:
    return RoutedTokens(x, expert_ids, jax.lax.stop_gradient(weights), weights)

  patch.setattr(dispatchers, 'RoutedTokens', tokens)


def first_weighs_one(patch: Patch) -> None:
  """Where GShard's draw leaves out the second expert, the first one is renormalised alone."""

  def change(found: Routing, b: Array, cfg: RouterConfig) -> Routing:
    if not (cfg.random_second and cfg.renormalise):
      return found
    alone = found.expert_ids[..., 1] == cfg.num_experts
    first = jnp.where(alone, cfg.scale, found.weights[..., 0])
    return found._replace(weights=found.weights.at[..., 0].set(first))

  change_routing(patch, change)


def momentum_at_no_rate(patch: Patch) -> None:
  """At a rate of 0 the momentum of SMEBU still moves the bias."""

  def update(state: BiasState, seen: Array, rate: Array, top_k: int) -> BiasState:
    moved = bias.smebu_step(state, seen, rate, top_k)
    return jax.tree.map(lambda new, old: jnp.where(seen.any(), new, old), moved, state)

  change_row(patch, bias.BIAS_RULES, 'smebu', update=update)


def turns_begin_anew(patch: Patch) -> None:
  """With a cache, places in a row are counted from the tokens at hand: experts take other turns."""

  def make(routed_tokens: Callable) -> Callable:
    return lambda batch, rows, has_cache: routed_tokens(batch, rows, has_cache=False)

  wrap(patch, 'routed_tokens', make, transformer)


def line_without_groups(patch: Patch) -> None:
  """The quantile rule measures from the (K+1)-th best of all experts, whatever groups left out."""

  def above_the_line(choice: Array, expert_ids: Array) -> Array:
    best = jax.lax.top_k(choice, expert_ids.shape[-1] + 1)[0]
    return choice - best[..., -1:]

  patch.setattr(bias_quantile, 'above_the_line', above_the_line)


def counts_of_a_skipped_step(patch: Patch) -> None:
  """A step that was skipped leaves its counts as the lagged f of the next."""
  seen: dict[str, Array] = {}

  def make(gradients: Callable) -> Callable:
    def changed(*args: object) -> gradient_accumulation.Gradients:
      found = gradients(*args)
      seen.update(found.seen)
      return found

    return changed

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return after._replace(lagged={name: seen[name] for name in after.lagged}), metrics

  wrap(patch, 'gradients', make, train_step)
  change_step(patch, change)


ADVERSARY: dict[str, Mutant] = {
  'tied head without gradient': Mutant(tied_head_detached, 'logged'),
  'next document ahead': Mutant(next_document_ahead, 'invariance'),
  'unbiased across micro-batches': Mutant(unbiased_across_micro_batches, 'invariance'),
  'buffer never emptied': Mutant(buffer_never_emptied, 'metrics'),
  'output bias not weighed': Mutant(bias_not_weighed, 'large'),
  'dropped by each tensor shard': Mutant(dropped_by_each_shard, 'large'),
  'room by combine weight': Mutant(room_by_weight, 'large'),
  'first expert weighs one': Mutant(first_weighs_one, 'oracle'),
  'momentum at no rate': Mutant(momentum_at_no_rate, 'oracle'),
  'turns begin anew': Mutant(turns_begin_anew, 'decoding'),
  'line without groups': Mutant(line_without_groups, 'oracle'),
  'counts of a skipped step': Mutant(counts_of_a_skipped_step, 'trained'),
}
