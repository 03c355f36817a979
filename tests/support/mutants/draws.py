"""Randomness that follows from what it should not, or does not follow from what it should."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.model import transformer
from moejax.moe import layer, routing, selection
from moejax.moe.selection import Tokens
from moejax.train.step import gradient_accumulation, objective
from tests.support.mutants.patching import Mutant, Patch, wrap


def same_noise_every_step(patch: Patch) -> None:
  """The key of a step is that of the run."""

  def make(of: Callable) -> Callable:
    def changed(key: Array | None, coefs: dict, cfg: object) -> Callable:
      return of(None if key is None else jax.random.key(cfg.seed), coefs, cfg)

    return changed

  wrap(patch, 'objective', make, gradient_accumulation)


def change_draws(patch: Patch, change: Callable[..., object], *modules: object) -> None:
  """What a forward pass is given to draw from: (key, rows) -> Draws, or None."""
  for module in modules:
    patch.setattr(module, 'Draws', change)


def noise_by_row_of_micro_batch(patch: Patch) -> None:
  """Rows draw by their number in the micro-batch, not in the batch."""
  draws = objective.Draws

  def change(key: Array, rows: Array) -> transformer.Draws:
    return draws(key, jnp.arange(len(rows)))

  change_draws(patch, change, objective, gradient_accumulation)


def counting_without_noise(patch: Patch) -> None:
  """The pass that only counts draws nothing."""
  change_draws(patch, lambda key, rows: None, gradient_accumulation)


def counting_with_other_noise(patch: Patch) -> None:
  """The pass that only counts draws from a key of its own."""
  draws = objective.Draws
  change_draws(
    patch, lambda key, rows: draws(jax.random.fold_in(key, 7), rows), gradient_accumulation
  )


def same_noise_in_every_layer(patch: Patch) -> None:
  """All layers draw from one key."""

  def make(keys: Callable) -> Callable:
    return lambda key, layers: jnp.stack([key] * layers)

  wrap(patch, 'layer_keys', make, transformer)


def change_key(patch: Patch, name: str, *modules: object) -> None:
  """A way to draw, from one key for ever."""

  def make(draw: Callable) -> Callable:
    def changed(x: Array, *rest: object) -> Array:
      fixed = [
        one._replace(key=None if one.key is None else jax.random.key(0))
        if isinstance(one, Tokens)
        else one
        for one in rest
      ]
      return draw(x, *fixed)

    return changed

  wrap(patch, name, make, *modules)


def same_experts_dropped(patch: Patch) -> None:
  """Expert dropout leaves out the same experts in every step and layer."""
  change_key(patch, 'without_some', selection, routing)


def same_second_experts(patch: Patch) -> None:
  """GShard's second expert is drawn alike in every step and layer."""
  change_key(patch, 'keep_second', selection, routing)


def same_jitter(patch: Patch) -> None:
  """The router's input is jittered alike in every step and layer."""
  change_key(patch, 'jittered', selection, layer)


def jitter_for_a_row(patch: Patch) -> None:
  """One factor jitters all places of a row."""

  def make(jittered: Callable) -> Callable:
    def changed(x: Array, tokens: Tokens, epsilon: float) -> Array:
      if not epsilon or tokens.key is None:
        return x
      factor = jittered(jnp.ones_like(x), tokens, epsilon)
      return x * factor[:, :1]

    return changed

  wrap(patch, 'jittered', make, selection, layer)


def noise_of_the_first_row(patch: Patch) -> None:
  """All rows draw the noise of the first."""

  def make(noisy: Callable) -> Callable:
    def changed(logits: Array, std: Array, tokens: Tokens, top_k: int) -> tuple[Array, Array]:
      return noisy(logits, std, tokens._replace(rows=0 * tokens.rows), top_k)

    return changed

  wrap(patch, 'noisy', make, selection, routing)


DRAWS: dict[str, Mutant] = {
  'same noise every step': Mutant(same_noise_every_step, 'invariance'),
  'noise by row of micro-batch': Mutant(noise_by_row_of_micro_batch, 'invariance'),
  'counting pass without noise': Mutant(counting_without_noise, 'invariance'),
  'counting pass with other noise': Mutant(counting_with_other_noise, 'invariance'),
  'same noise in every layer': Mutant(same_noise_in_every_layer, 'invariance'),
  'same experts dropped': Mutant(same_experts_dropped, 'invariance'),
  'same second experts': Mutant(same_second_experts, 'invariance'),
  'same jitter': Mutant(same_jitter, 'invariance'),
  'jitter for a row': Mutant(jitter_for_a_row, 'invariance'),
  'noise of the first row': Mutant(noise_of_the_first_row, 'invariance'),
}
