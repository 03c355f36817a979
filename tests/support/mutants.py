"""Mistakes that were made in public, or nearly: each replaces something of moejax, and names the line that must object.

Most are from the list of what leading codebases got wrong; the last four are one more for lines that these leave out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.model.transformer import Output, Transformer
from moejax.moe import balance, bias, layer, routing, selection
from moejax.moe import token_sets as sets
from moejax.moe.balance import aux_loss as canonical
from moejax.moe.bias_quantile import quantile
from moejax.sharding.logical_axes import row_shards
from moejax.train.step import objective
from moejax.train.step import train_step as step

Patch = pytest.MonkeyPatch
MICRO_BATCHES = 2  # into which the lines that look at bias rules cut a batch


class Mutant(NamedTuple):
  apply: Callable[[Patch], None]
  line: str  # of the certificate, that must fail


def rerouted(
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


def row(patch: Patch, rows: dict, name: str, **changes: object) -> None:
  patch.setitem(rows, name, rows[name]._replace(**changes))


def called(patch: Patch, change: Callable[[Transformer, Output], Output]) -> None:
  """Every forward pass changed after the fact."""
  call = Transformer.__call__
  patch.setattr(
    Transformer, '__call__', lambda self, *args, **named: change(self, call(self, *args, **named))
  )


def softmax_for_sigmoid(patch: Patch) -> None:
  patch.setitem(routing.SCORE_FNS, 'sigmoid', jax.nn.log_softmax)


def top_k_weights_for_full_scores(patch: Patch) -> None:
  def change(found: routing.Routing, bias: Array, cfg: routing.RouterConfig) -> routing.Routing:
    chosen = jax.nn.one_hot(found.expert_ids, cfg.num_experts)
    return found._replace(probs=(chosen * found.weights[..., None]).sum(2))

  rerouted(patch, change)


def bias_inside_p(patch: Patch) -> None:
  def change(found: routing.Routing, bias: Array, cfg: routing.RouterConfig) -> routing.Routing:
    biased = found.scores + bias
    return found._replace(probs=biased / biased.sum(-1, keepdims=True))

  rerouted(patch, change)


def counts_per_shard(patch: Patch) -> None:
  def first_shard(found: routing.Routing, b: Array, mask: Array) -> Array:
    rows = mask.shape[0] // row_shards()
    return row_shards() * sets.expert_load(found.expert_ids[:rows], mask[:rows], b.shape[-1])

  row(patch, bias.BIAS_RULES, 'sign', observe=first_shard)


def sum_for_mean_over_micro_batches(patch: Patch) -> None:
  patch.setattr(objective, 'micro_batch_shares', lambda name, mask, segments, scope: jnp.ones(mask.shape[0]))


def padded_tokens_counted(patch: Patch) -> None:
  matrix = sets.assignment_matrix
  for module in (sets, canonical):
    patch.setattr(
      module,
      'assignment_matrix',
      lambda ids, mask, experts: matrix(ids, jnp.ones_like(mask), experts),
    )


def two_softmaxes(patch: Patch) -> None:
  patch.setitem(routing.SCORE_FNS, 'softmax', lambda z: jax.nn.log_softmax(jax.nn.softmax(z)))


def pooled_layers(patch: Patch) -> None:
  """f and P each averaged over all layers before their product."""

  def f_and_p(
    found: routing.Routing, mask: Array, segments: Array, scope: sets.Scope = sets.Scope()
  ) -> Array:
    counts, weight = canonical.assignment_counts(found, mask, scope), mask[..., None] / mask.sum()
    return jnp.stack(
      [counts.size * counts / counts.sum(), (found.probs * weight).sum((0, 1))]
    )  # [2, E]

  def pool(model: Transformer, out: Output) -> Output:
    if 'global_batch' not in out.aux.losses:
      return out
    f, p = out.aux.losses['global_batch'].mean(0)
    pooled = jnp.broadcast_to((f * p).sum(), len(out.aux.load))
    return out._replace(aux=out.aux._replace(losses=out.aux.losses | {'global_batch': pooled}))

  row(patch, balance.BALANCE_LOSSES, 'global_batch', value=f_and_p)
  called(patch, pool)


def count_twice_under_remat(patch: Patch) -> None:
  def twice(model: Transformer, out: Output) -> Output:
    times = 1 if model.cfg.remat == 'none' else 2
    return out._replace(aux=out.aux._replace(load=times * out.aux.load, seen=times * out.aux.seen))

  called(patch, twice)


def mean_of_signs(patch: Patch) -> None:
  def sign(found: routing.Routing, b: Array, mask: Array) -> Array:
    return jnp.sign(bias.shortfall(bias.counts(found, b, mask)))

  def step(state: bias.BiasState, signs: Array, rate: Array, top_k: int) -> bias.BiasState:
    return state._replace(bias=state.bias + rate * signs / MICRO_BATCHES)

  row(patch, bias.BIAS_RULES, 'sign', observe=sign, update=step)


def average_of_quantiles(patch: Patch) -> None:
  def each(found: routing.Routing, b: Array, mask: Array) -> Array:
    return quantile(bias.distances(found, b, mask), found.expert_ids.shape[-1])

  def step(state: bias.BiasState, quantiles: Array, rate: Array, top_k: int) -> bias.BiasState:
    moved = state.bias - quantiles / MICRO_BATCHES
    return state._replace(bias=moved - moved.mean())

  row(patch, bias.BIAS_RULES, 'quantile', observe=each, update=step)


def wrong_k_factor(patch: Patch) -> None:
  """Divided by the tokens, not by their copies."""
  loss = balance.BALANCE_LOSSES['sequence'].value
  row(
    patch,
    balance.BALANCE_LOSSES,
    'sequence',
    value=lambda found, *rest: found.expert_ids.shape[-1] * loss(found, *rest),
  )


def bias_moved_by_evaluation(patch: Patch) -> None:
  """A buffer of counts that evaluation fills, too, and that the next step empties into the bias."""
  buffer: list[np.ndarray] = []
  evaluate, move = step.eval_step, step.update_router_bias

  def counting(*args: object) -> step.Metrics:
    found = evaluate(*args)
    kept = jax.experimental.io_callback(
      lambda load: buffer.append(load) or np.asarray(load), found['load'], found['load']
    )
    return found | {'load': kept}

  def from_buffer(router: bias.BiasState, seen: Array, *rest: object) -> bias.BiasState:
    if not jax.sharding.get_abstract_mesh().empty:
      return move(router, seen, *rest)
    more = jax.experimental.io_callback(
      lambda like: np.asarray(sum(buffer, np.zeros_like(like)), np.float32), seen, seen
    )
    return move(router, seen + more, *rest)

  patch.setattr(step, 'eval_step', counting)
  patch.setattr(step, 'update_router_bias', from_buffer)


def bias_decayed(patch: Patch) -> None:
  move = step.update_router_bias

  def move_decayed(router: bias.BiasState, *rest: object) -> bias.BiasState:
    return move(router._replace(bias=0.99 * router.bias), *rest)

  patch.setattr(step, 'update_router_bias', move_decayed)


def gradient_never_attached(patch: Patch) -> None:
  """The balance losses are logged, added to what is printed, and not differentiated."""
  terms = objective.balance_terms

  def detached(*args: object) -> tuple[Array, objective.Terms]:
    return jax.tree.map(jax.lax.stop_gradient, terms(*args))

  patch.setattr(objective, 'balance_terms', detached)


def tiny_epsilon(patch: Patch) -> None:
  """Normalised by a sum with an epsilon in it: logits near -50 then shrink the loss."""
  rerouted(
    patch,
    lambda found, b, cfg: found._replace(
      probs=found.scores / (found.scores.sum(-1, keepdims=True) + 1e-20)
    ),
  )


def expert_choice_labelled_causal(patch: Patch) -> None:
  row(patch, selection.SELECTIONS, 'expert_choice', causal=True)


def token_choice_labelled_non_causal(patch: Patch) -> None:
  row(patch, selection.SELECTIONS, 'hash', causal=False)


MUTANTS: dict[str, Mutant] = {
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
