"""Mistakes drawn after the lines stood, to find out what these had not been written for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model import transformer
from moejax.moe import bias, layer, routing, selection
from moejax.moe.balance import importance
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.selection import Tokens
from moejax.train.step import gradient_accumulation, objective, train_step
from moejax.train.step.train_state import TrainState
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_output,
  change_routing,
  change_row,
  change_step,
  wrap,
)
from tests.support.mutants.sums import change_statistic


def change_row_sets(patch: Patch, change: Callable[[Callable], Callable]) -> None:
  """The losses over sets of rows, each changed: (routing, mask, segments, scope) -> value."""
  for name in ('ep_group', 'global_batch', 'micro_batch'):
    change_row(patch, BALANCE_LOSSES, name, value=change(BALANCE_LOSSES[name].value))


def buffer_without_its_own(patch: Patch) -> None:
  """A running f lacks the micro-batch at hand."""

  def change(value: Callable) -> Callable:
    return lambda found, mask, segments, scope: value(
      found, mask, segments, scope._replace(running=False)
    )

  change_row_sets(patch, change)


def one_sided_jitter(patch: Patch) -> None:
  """Jitter only enlarges."""

  def make(jittered: Callable) -> Callable:
    def changed(x: Array, tokens: Tokens, epsilon: float) -> Array:
      drawn = jittered(x, tokens, epsilon)
      return drawn if drawn is x else drawn + epsilon * x

    return changed

  wrap(patch, 'jittered', make, selection, layer)


def second_by_its_weight(patch: Patch) -> None:
  """GShard's second expert is used with probability g2, not 2 g2."""

  def make(keep: Callable) -> Callable:
    return lambda weights, tokens: keep(weights / 2, tokens)

  wrap(patch, 'keep_second', make, selection, routing)


def mean_of_gradients(patch: Patch) -> None:
  """Gradients of micro-batches are averaged, which are parts of a sum already."""

  def make(gradients: Callable) -> Callable:
    def changed(state: TrainState, batch: object, cfg: object) -> object:
      found = gradients(state, batch, cfg)
      return found._replace(grads=jax.tree.map(lambda g: g / cfg.micro_batches, found.grads))

    return changed

  wrap(patch, 'gradients', make, train_step)


def router_in_bfloat16(patch: Patch) -> None:
  """The router's input is rounded to bfloat16."""

  def make(logits: Callable) -> Callable:
    return lambda x, w: logits(x.astype(jnp.bfloat16), w)

  wrap(patch, 'router_logits', make, routing, layer)


def p_without_gradient(patch: Patch) -> None:
  """P has no gradient."""

  def change(found: Routing, b: Array, cfg: RouterConfig) -> Routing:
    return found._replace(probs=jax.lax.stop_gradient(found.probs))

  change_routing(patch, change)


def skipped_step_does_not_count(patch: Patch) -> None:
  """A skipped step leaves the number of the step."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return after._replace(step=jnp.where(metrics['skipped'], before.step, after.step)), metrics

  change_step(patch, change)


def softer_smebu(patch: Patch) -> None:
  """SMEBU's tanh has another slope."""
  patch.setattr(bias, 'SHARPNESS', 1.0)


def quantile_not_centred(patch: Patch) -> None:
  """The quantile rule's biases drift."""
  rule = bias.BIAS_RULES['quantile']

  def update(state: bias.BiasState, *rest: object) -> bias.BiasState:
    moved = rule.update(state, *rest)
    drifted = jnp.where((moved.bias == state.bias).all(), moved.bias, moved.bias + 0.01)
    return moved._replace(bias=drifted)

  change_row(patch, bias.BIAS_RULES, 'quantile', update=update)


def mean_of_rows(patch: Patch) -> None:
  """The language model's loss is the mean over rows, each by its own length."""

  def make(weights: Callable) -> Callable:
    def changed(batch: object, cfg: object) -> Array:
      found = weights(batch, cfg)
      return found / jnp.maximum(found.sum(-1, keepdims=True), 1)

    return changed

  wrap(patch, 'token_weights', make, objective)


def company_with_itself(patch: Patch) -> None:
  """An expert's most frequent partner may be itself."""
  change_statistic(
    patch,
    'token_statistics',
    lambda found: {'coactivation': jnp.ones_like(found['coactivation'])},
  )


def dead_experts_of_the_mean(patch: Patch) -> None:
  """Experts below the mean count as dead."""

  def make(statistics: Callable) -> Callable:
    def changed(load: Array, top_k: int) -> dict:
      below = (load < load.mean(-1, keepdims=True)).sum(-1)
      return statistics(load, top_k) | {'dead_experts': below}

    return changed

  wrap(patch, 'layer_statistics', make, train_step)


def bias_of_the_first_layer(patch: Patch) -> None:
  """Blocks of multi-token prediction route by the bias of the first layer."""

  def make(take: Callable) -> Callable:
    def changed(tree: object, index: int) -> object:
      found = take(tree, index)
      if isinstance(tree, transformer.PerLayer):
        return found._replace(bias=tree.bias[0])
      return found

    return changed

  wrap(patch, 'layer_of', make, transformer)


def importance_of_a_part(patch: Patch) -> None:
  """Importance under accumulation has the gradient of a part for that of the whole."""
  patch.setattr(importance, 'parts_of_set', lambda rows, micro_rows: 1)


def count_of_the_counting_pass(patch: Patch) -> None:
  """A pass that only counts adds its load to that of the step."""

  def make(gradients: Callable) -> Callable:
    def changed(state: TrainState, batch: object, cfg: object) -> object:
      found = gradients(state, batch, cfg)
      times = 1 + bool(found.seen) * (cfg.balance.accumulation == 'exact')
      return found._replace(sums=found.sums._replace(load=times * found.sums.load))

    return changed

  wrap(patch, 'gradients', make, train_step)


def grouped_p(patch: Patch) -> None:
  """P is normalised within the best groups."""

  def change(found: Routing, b: Array, cfg: RouterConfig) -> Routing:
    if cfg.num_groups == 1:
      return found
    parts = found.probs.reshape(*found.probs.shape[:-1], cfg.num_groups, -1)
    normal = parts / parts.sum(-1, keepdims=True) / cfg.num_groups
    return found._replace(probs=normal.reshape(found.probs.shape))

  change_routing(patch, change)


def dropout_keeps_choice(patch: Patch) -> None:
  """Expert dropout leaves out one expert too few."""

  def make(drop: Callable) -> Callable:
    return lambda choice, tokens, fraction: drop(choice, tokens, fraction - 1 / choice.shape[-1])

  wrap(patch, 'without_some', make, selection, routing)


def f_is_capped(patch: Patch) -> None:
  """A loss of more than twice its balance is cut."""

  def change(value: Callable) -> Callable:
    return lambda found, mask, segments, scope: jnp.minimum(
      value(found, mask, segments, scope), 2.0
    )

  change_row_sets(patch, change)


def statistics_of_first_layer(patch: Patch) -> None:
  """All layers have the statistics of the first."""

  def first(model: object, out: object) -> object:
    stats = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), out.aux.stats)
    return out._replace(aux=out.aux._replace(stats=stats))

  change_output(patch, first)


def gap_of_one_layer(patch: Patch) -> None:
  """The gap of f is that of the last layer."""

  def make(gap: Callable) -> Callable:
    return lambda used, truth: gap(used[:, -1:], truth[:, -1:])

  wrap(patch, 'f_gap', make, gradient_accumulation)


NEIGHBOURS: dict[str, Mutant] = {
  'running f without its own': Mutant(buffer_without_its_own, 'metrics'),
  'one-sided jitter': Mutant(one_sided_jitter, 'invariance'),
  'second expert by its weight': Mutant(second_by_its_weight, 'invariance'),
  'mean of gradients': Mutant(mean_of_gradients, 'invariance'),
  'router in bfloat16': Mutant(router_in_bfloat16, 'logged'),
  'P without gradient': Mutant(p_without_gradient, 'oracle'),
  'skipped step does not count': Mutant(skipped_step_does_not_count, 'trained'),
  'softer SMEBU': Mutant(softer_smebu, 'oracle'),
  'quantile that drifts': Mutant(quantile_not_centred, 'bias'),
  'mean of rows': Mutant(mean_of_rows, 'invariance'),
  'company with itself': Mutant(company_with_itself, 'metrics'),
  'dead below the mean': Mutant(dead_experts_of_the_mean, 'metrics'),
  'bias of the first layer': Mutant(bias_of_the_first_layer, 'layers'),
  'importance of a part': Mutant(importance_of_a_part, 'invariance'),
  'load of the counting pass': Mutant(count_of_the_counting_pass, 'invariance'),
  'P within groups': Mutant(grouped_p, 'probabilities'),
  'one expert too few dropped': Mutant(dropout_keeps_choice, 'invariance'),
  'losses capped': Mutant(f_is_capped, 'oracle'),
  'statistics of the first layer': Mutant(statistics_of_first_layer, 'metrics'),
  'f_gap of the last layer': Mutant(gap_of_one_layer, 'metrics'),
}
