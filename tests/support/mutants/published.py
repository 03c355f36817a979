"""Mistakes that were made in public, or nearly: most have been shipped by published codebases.

Letters: B batch, S sequence, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.model.transformer import Output, Transformer
from moejax.moe import bias, routing, token_sets
from moejax.moe.balance import aux_loss
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias_quantile import quantile
from moejax.moe.selection import SELECTIONS
from moejax.sharding.logical_axes import row_shards
from moejax.train.step import objective, train_step
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_output,
  change_routing,
  change_row,
)

MICRO_BATCHES = 2  # into which the lines that look at bias rules cut a batch


def softmax_for_sigmoid(patch: Patch) -> None:
  """Scores of another function than the config's."""
  patch.setitem(routing.SCORE_FNS, 'sigmoid', jax.nn.log_softmax)


def top_k_weights_for_full_scores(patch: Patch) -> None:
  """P is 0 for experts that were not chosen."""

  def change(found: routing.Routing, bias: Array, cfg: routing.RouterConfig) -> routing.Routing:
    chosen = jax.nn.one_hot(found.expert_ids, cfg.num_experts)
    return found._replace(probs=(chosen * found.weights[..., None]).sum(2))

  change_routing(patch, change)


def bias_inside_p(patch: Patch) -> None:
  """P normalises the biased scores, by which experts are chosen."""

  def change(found: routing.Routing, bias: Array, cfg: routing.RouterConfig) -> routing.Routing:
    biased = found.scores + bias
    return found._replace(probs=biased / biased.sum(-1, keepdims=True))

  change_routing(patch, change)


def counts_per_shard(patch: Patch) -> None:
  """The rule counts the rows of one shard, as if the others had the same."""

  def first_shard(found: routing.Routing, b: Array, mask: Array) -> Array:
    rows = mask.shape[0] // row_shards()
    load = token_sets.expert_load(found.expert_ids[:rows], mask[:rows], b.shape[-1])
    return row_shards() * load

  change_row(patch, bias.BIAS_RULES, 'sign', observe=first_shard)


def sum_for_mean_over_micro_batches(patch: Patch) -> None:
  """Every micro-batch counts as a whole batch."""

  def ones(name: str, mask: Array, segments: Array, scope: token_sets.Scope) -> Array:
    return jnp.ones(mask.shape[0])

  patch.setattr(objective, 'micro_batch_shares', ones)


def padded_tokens_counted(patch: Patch) -> None:
  """f counts the experts that padding was sent to."""

  def of_all_tokens(ids: Array, mask: Array, num_experts: int) -> Array:
    return ids

  patch.setattr(token_sets, 'masked_ids', of_all_tokens)


def two_softmaxes(patch: Patch) -> None:
  """The scores are the softmax of a softmax."""
  patch.setitem(routing.SCORE_FNS, 'softmax', lambda z: jax.nn.log_softmax(jax.nn.softmax(z)))


def pooled_layers(patch: Patch) -> None:
  """f and P each averaged over all layers before their product."""

  def f_and_p(
    found: routing.Routing,
    mask: Array,
    segments: Array,
    scope: token_sets.Scope = token_sets.Scope(),
  ) -> Array:
    counts = aux_loss.assignment_counts(found, mask, scope)
    f = counts.size * counts / counts.sum()
    p = (found.probs * mask[..., None] / mask.sum()).sum((0, 1))
    return jnp.stack([f, p])  # [2, E]

  def pool(model: Transformer, out: Output) -> Output:
    if 'global_batch' not in out.aux.losses:
      return out
    f, p = out.aux.losses['global_batch'].mean(0)
    pooled = jnp.broadcast_to((f * p).sum(), len(out.aux.load))
    return out._replace(aux=out.aux._replace(losses=out.aux.losses | {'global_batch': pooled}))

  change_row(patch, BALANCE_LOSSES, 'global_batch', value=f_and_p)
  change_output(patch, pool)


def count_twice_under_remat(patch: Patch) -> None:
  """A count in the forward pass, which recomputation runs a second time."""

  def twice(model: Transformer, out: Output) -> Output:
    times = 1 if model.cfg.remat == 'none' else 2
    return out._replace(aux=out.aux._replace(load=times * out.aux.load, seen=times * out.aux.seen))

  change_output(patch, twice)


def mean_of_signs(patch: Patch) -> None:
  """Each micro-batch has a step of its own, and the bias moves by their mean."""

  def sign(found: routing.Routing, b: Array, mask: Array) -> Array:
    return jnp.sign(bias.shortfall(bias.counts(found, b, mask)))

  def step(state: bias.BiasState, signs: Array, rate: Array, top_k: int) -> bias.BiasState:
    return state._replace(bias=state.bias + rate * signs / MICRO_BATCHES)

  change_row(patch, bias.BIAS_RULES, 'sign', observe=sign, update=step)


def average_of_quantiles(patch: Patch) -> None:
  """The mean of the micro-batches' quantiles for the quantile of the batch."""

  def each(found: routing.Routing, b: Array, mask: Array) -> Array:
    return quantile(bias.distances(found, b, mask), found.expert_ids.shape[-1])

  def step(state: bias.BiasState, quantiles: Array, rate: Array, top_k: int) -> bias.BiasState:
    moved = state.bias - quantiles / MICRO_BATCHES
    return state._replace(bias=moved - moved.mean())

  change_row(patch, bias.BIAS_RULES, 'quantile', observe=each, update=step)


def wrong_k_factor(patch: Patch) -> None:
  """Divided by the tokens, not by their copies."""
  loss = BALANCE_LOSSES['sequence'].value

  def times_k(found: routing.Routing, *rest: object) -> Array:
    return found.expert_ids.shape[-1] * loss(found, *rest)

  change_row(patch, BALANCE_LOSSES, 'sequence', value=times_k)


def bias_moved_by_evaluation(patch: Patch) -> None:
  """A buffer of counts that evaluation fills, too, and that the next step empties into the bias."""
  buffer: list[np.ndarray] = []
  evaluate, move = train_step.eval_step, train_step.update_router_bias

  def append(load: np.ndarray) -> np.ndarray:
    buffer.append(load)
    return np.asarray(load)

  def total(like: np.ndarray) -> np.ndarray:
    return np.asarray(sum(buffer, np.zeros_like(like)), like.dtype)

  def counting(*args: object) -> train_step.Metrics:
    found = evaluate(*args)
    # What the call returns is used, so that the compiler does not drop it.
    load = jax.experimental.io_callback(append, found['load'], found['load'])
    return found | {'load': load}

  def from_buffer(router: bias.BiasState, seen: Array, *rest: object) -> bias.BiasState:
    # The line evaluates without a mesh; its steps on one are left as they are.
    if not jax.sharding.get_abstract_mesh().empty:
      return move(router, seen, *rest)
    return move(router, seen + jax.experimental.io_callback(total, seen, seen), *rest)

  patch.setattr(train_step, 'eval_step', counting)
  patch.setattr(train_step, 'update_router_bias', from_buffer)


def bias_decayed(patch: Patch) -> None:
  """Weight decay takes hold of the router bias."""
  move = train_step.update_router_bias

  def move_decayed(router: bias.BiasState, *rest: object) -> bias.BiasState:
    return move(router._replace(bias=0.99 * router.bias), *rest)

  patch.setattr(train_step, 'update_router_bias', move_decayed)


def gradient_never_attached(patch: Patch) -> None:
  """The balance losses are logged, added to what is printed, and not differentiated."""
  terms = objective.balance_terms

  def detached(*args: object) -> tuple[Array, objective.Terms]:
    return jax.tree.map(jax.lax.stop_gradient, terms(*args))

  patch.setattr(objective, 'balance_terms', detached)


def tiny_epsilon(patch: Patch) -> None:
  """Normalised by a sum with an epsilon in it: logits near -50 then shrink the loss."""

  def change(found: routing.Routing, b: Array, cfg: routing.RouterConfig) -> routing.Routing:
    total = found.scores.sum(-1, keepdims=True) + 1e-20
    return found._replace(probs=found.scores / total)

  change_routing(patch, change)


def expert_choice_labelled_causal(patch: Patch) -> None:
  """A label that hides that experts choose among all tokens of a row."""
  change_row(patch, SELECTIONS, 'expert_choice', causal=True)


def token_choice_labelled_non_causal(patch: Patch) -> None:
  """A label that says of a causal router that it looks ahead."""
  change_row(patch, SELECTIONS, 'hash', causal=False)


PUBLISHED: dict[str, Mutant] = {
  'softmax for sigmoid': Mutant(softmax_for_sigmoid, 'probabilities'),
  'top-k weights for full scores': Mutant(top_k_weights_for_full_scores, 'probabilities'),
  'bias inside P': Mutant(bias_inside_p, 'probabilities'),
  'counts per shard': Mutant(counts_per_shard, 'bias'),
  'sum for mean over micro-batches': Mutant(sum_for_mean_over_micro_batches, 'invariance'),
  'padded tokens counted': Mutant(padded_tokens_counted, 'padding'),
  'two softmaxes': Mutant(two_softmaxes, 'oracle'),
  'pooled layers': Mutant(pooled_layers, 'layers'),
  'count twice under remat': Mutant(count_twice_under_remat, 'bias'),
  'mean of signs': Mutant(mean_of_signs, 'bias'),
  'average of quantiles': Mutant(average_of_quantiles, 'bias'),
  'wrong K factor': Mutant(wrong_k_factor, 'balance'),
  'bias moved by evaluation': Mutant(bias_moved_by_evaluation, 'bias'),
  'bias decayed': Mutant(bias_decayed, 'bias'),
  'gradient never attached': Mutant(gradient_never_attached, 'logged'),
  'tiny epsilon': Mutant(tiny_epsilon, 'shrink'),
  'expert choice labelled causal': Mutant(expert_choice_labelled_causal, 'causality'),
  'token choice labelled non-causal': Mutant(token_choice_labelled_non_causal, 'causality'),
}
