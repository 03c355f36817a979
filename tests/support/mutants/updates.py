"""Parameters, schedules and state that do not move as they should."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.config import schedule
from moejax.moe import bias
from moejax.train import optimizer
from moejax.train.step import train_step
from moejax.train.step.train_state import TrainState
from tests.support.mutants.patching import (
  Mutant,
  Patch,
  change_row,
  change_step,
  map_leaves,
  wrap,
)


def change_updates(patch: Patch, change: Callable[[str, Array], Array]) -> None:
  """The optimiser's updates changed before they are added, by path."""

  def make(apply: Callable) -> Callable:
    return lambda params, updates: apply(params, map_leaves(change, updates))

  wrap(patch, 'apply_updates', make, optax)


def router_update_never_applied(patch: Patch) -> None:
  """The router has gradient and moments, and its update is not applied."""
  change_updates(patch, lambda path, u: 0 * u if 'moe/router' in path else u)


def router_ten_times_faster(patch: Patch) -> None:
  """The router has ten times the learning rate."""
  change_updates(patch, lambda path, u: 10 * u if 'moe/router' in path else u)


def norms_decayed(patch: Patch) -> None:
  """Weight decay shrinks the scales of norms."""
  patch.setattr(optimizer, 'decay_mask', lambda params: jax.tree.map(lambda p: True, params))


def nothing_decayed(patch: Patch) -> None:
  """Weight decay shrinks nothing."""
  patch.setattr(optimizer, 'decay_mask', lambda params: jax.tree.map(lambda p: False, params))


def no_clipping(patch: Patch) -> None:
  """Gradients are not clipped."""
  patch.setattr(optimizer, 'clip_by_known_norm', lambda norm: optax.identity())


def clipped_by_entry(patch: Patch) -> None:
  """Each entry of the gradient is clipped, not the norm of all."""
  patch.setattr(optimizer, 'clip_by_known_norm', lambda norm: optax.clip(norm / 100))


def change_adamw(patch: Patch, change: Callable[[dict], dict]) -> None:
  """AdamW with other constants."""

  def make(adamw: Callable) -> Callable:
    return lambda rate, **named: adamw(rate, **change(named))

  wrap(patch, 'adamw', make, optax)


def eps_inside_the_root(patch: Patch) -> None:
  """AdamW's eps is added under the root."""
  change_adamw(patch, lambda named: named | {'eps': 0.0, 'eps_root': named['eps']})


def betas_swapped(patch: Patch) -> None:
  """AdamW's two decay rates are swapped."""
  change_adamw(patch, lambda named: named | {'b1': named['b2'], 'b2': named['b1']})


def decay_coupled(patch: Patch) -> None:
  """Decay is added to the gradient (Adam with L2), not to the update."""

  def make(adamw: Callable) -> Callable:
    def coupled(rate: object, **named: object) -> optax.GradientTransformation:
      decay, mask = named.pop('weight_decay'), named.pop('mask')
      added = optax.add_decayed_weights(decay, mask)
      return optax.chain(added, adamw(rate, weight_decay=0.0, mask=mask, **named))

    return coupled

  wrap(patch, 'adamw', make, optax)


def shifted_rate(patch: Patch, by: int) -> None:
  """The learning rate of another update."""

  def make(learning_rate: Callable) -> Callable:
    def changed(*args: object) -> Callable:
      rate = learning_rate(*args)
      return lambda count: rate(count + by)

    return changed

  wrap(patch, 'learning_rate', make, optimizer, train_step)


def rate_an_update_late(patch: Patch) -> None:
  """The learning rate is that of the update before: the first one is wasted."""
  shifted_rate(patch, -1)


def rate_an_update_early(patch: Patch) -> None:
  """The learning rate is that of the next update."""
  shifted_rate(patch, 1)


def rate_by_the_step(patch: Patch) -> None:
  """The learning rate that is logged counts skipped steps."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return after, metrics | {'learning_rate': 0.01 * jnp.minimum(1, (before.step + 1) / 3)}

  change_step(patch, change)


def straight_cosine(patch: Patch) -> None:
  """A cosine piece of a schedule is a straight line."""
  patch.setitem(schedule.SHAPES, 'cosine', lambda passed: passed)


def piece_of_a_step_too_few(patch: Patch) -> None:
  """A sloping piece of a schedule arrives a step early."""
  patch.setitem(schedule.SHAPES, 'linear', lambda passed: jnp.minimum(1.05 * passed, 1))


def skipped_where(after: TrainState, metrics: dict, **changed: object) -> tuple[TrainState, dict]:
  """The state with other fields after a step that was skipped."""
  fields = {}
  for name, value in changed.items():
    fields[name] = jax.tree.map(
      lambda new, old: jnp.where(metrics['skipped'], new, old), value, getattr(after, name)
    )
  return after._replace(**fields), metrics


def skipped_step_counts(patch: Patch) -> None:
  """A skipped step counts as an update of the optimiser."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    more = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.int32 else a, after.opt_state)
    return skipped_where(after, metrics, opt_state=more)

  change_step(patch, change)


def skipped_step_decays(patch: Patch) -> None:
  """A skipped step decays the parameters."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return skipped_where(after, metrics, model=jax.tree.map(lambda a: 0.999 * a, after.model))

  change_step(patch, change)


def skipped_step_moves_bias(patch: Patch) -> None:
  """A skipped step moves the router bias."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    moved = after.router._replace(bias=after.router.bias + 0.01)
    return skipped_where(after, metrics, router=moved)

  change_step(patch, change)


def change_bias_update(patch: Patch, change: Callable[..., bias.BiasState]) -> None:
  """The update of the router bias: (update, router, seen, step, cfg) -> state."""

  def make(update: Callable) -> Callable:
    return lambda *args: change(update, *args)

  wrap(patch, 'update_router_bias', make, train_step)


def bias_rate_a_step_early(patch: Patch) -> None:
  """The bias moves by the rate of the next step."""
  change_bias_update(patch, lambda f, router, seen, step, cfg: f(router, seen, step + 1, cfg))


def bias_rate_a_step_late(patch: Patch) -> None:
  """The bias moves by the rate of the step before."""
  change_bias_update(patch, lambda f, router, seen, step, cfg: f(router, seen, step - 1, cfg))


def bias_moved_twice(patch: Patch) -> None:
  """The bias moves twice a step."""
  change_bias_update(
    patch, lambda f, router, seen, step, cfg: f(f(router, seen, step, cfg), seen, step, cfg)
  )


def bias_rounded(patch: Patch) -> None:
  """The bias is kept in bfloat16's precision."""

  def rounded(f: Callable, *args: object) -> bias.BiasState:
    new = f(*args)
    return new._replace(bias=new.bias.astype(jnp.bfloat16).astype(jnp.float32))

  change_bias_update(patch, rounded)


def bias_the_wrong_way(patch: Patch) -> None:
  """Crowded experts are made more attractive."""
  rule = bias.BIAS_RULES['sign']

  def update(state: bias.BiasState, seen: Array, rate: Array, top_k: int) -> bias.BiasState:
    moved = rule.update(state, seen, rate, top_k)
    return moved._replace(bias=2 * state.bias - moved.bias)

  change_row(patch, bias.BIAS_RULES, 'sign', update=update)


def momentum_forgotten(patch: Patch) -> None:
  """SMEBU's momentum starts anew each step."""
  rule = bias.BIAS_RULES['smebu']

  def update(state: bias.BiasState, *rest: object) -> bias.BiasState:
    return rule.update(state._replace(momentum=0 * state.momentum), *rest)

  change_row(patch, bias.BIAS_RULES, 'smebu', update=update)


UPDATES: dict[str, Mutant] = {
  'router update never applied': Mutant(router_update_never_applied, 'trained'),
  'router ten times faster': Mutant(router_ten_times_faster, 'trained'),
  'norms decayed': Mutant(norms_decayed, 'trained'),
  'nothing decayed': Mutant(nothing_decayed, 'trained'),
  'no clipping': Mutant(no_clipping, 'trained'),
  'clipped by entry': Mutant(clipped_by_entry, 'trained'),
  'eps inside the root': Mutant(eps_inside_the_root, 'trained'),
  'betas swapped': Mutant(betas_swapped, 'trained'),
  'decay coupled': Mutant(decay_coupled, 'trained'),
  'learning rate an update late': Mutant(rate_an_update_late, 'trained'),
  'learning rate an update early': Mutant(rate_an_update_early, 'trained'),
  'learning rate by the step': Mutant(rate_by_the_step, 'trained'),
  'straight cosine': Mutant(straight_cosine, 'trained'),
  'slope that arrives early': Mutant(piece_of_a_step_too_few, 'trained'),
  'skipped step counts': Mutant(skipped_step_counts, 'trained'),
  'skipped step decays': Mutant(skipped_step_decays, 'trained'),
  'skipped step moves the bias': Mutant(skipped_step_moves_bias, 'trained'),
  'bias rate a step early': Mutant(bias_rate_a_step_early, 'bias'),
  'bias rate a step late': Mutant(bias_rate_a_step_late, 'bias'),
  'bias moved twice': Mutant(bias_moved_twice, 'bias'),
  'bias in bfloat16': Mutant(bias_rounded, 'bias'),
  'bias the wrong way': Mutant(bias_the_wrong_way, 'bias'),
  'momentum forgotten': Mutant(momentum_forgotten, 'oracle'),
}
