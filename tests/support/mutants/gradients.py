"""Gradients that are not those of what is logged."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe import layer
from moejax.moe.routing import Routing
from moejax.train.step import (
  gradient_accumulation,
  gradient_interference,
  objective,
)
from moejax.train.step.train_state import TrainState
from tests.support.mutants.patching import Mutant, Patch, change_grads, change_step, wrap


def zero_where(patch: Patch, is_zero: Callable[[str], bool]) -> None:
  """Leaves of the gradient set to 0, by path."""
  change_grads(patch, lambda path, g: jnp.zeros_like(g) if is_zero(path) else g)


def frozen_router(patch: Patch) -> None:
  """The router has no gradient."""
  zero_where(patch, lambda path: 'moe/router' in path)


def frozen_embedding(patch: Patch) -> None:
  """The embedding has no gradient."""
  zero_where(patch, lambda path: 'embed' in path)


def only_the_embedding(patch: Patch) -> None:
  """The gradient is 0 but for the embedding."""
  zero_where(patch, lambda path: 'embed' not in path)


def frozen_norms(patch: Patch) -> None:
  """The scales of norms have no gradient."""
  zero_where(patch, lambda path: 'scale' in path)


def frozen_shared_gate(patch: Patch) -> None:
  """The gate of the shared expert has no gradient."""
  zero_where(patch, lambda path: 'shared_gate' in path)


def one_expert_frozen(patch: Patch) -> None:
  """The last expert's down projection has no gradient."""
  change_grads(patch, lambda path, g: g.at[:, -1].set(0) if 'experts/down' in path else g)


def last_layer_frozen(patch: Patch) -> None:
  """The last layer of the stack has no gradient in its queries."""
  change_grads(patch, lambda p, g: g.at[-1].set(0) if p.startswith('blocks/attention/q') else g)


def half_of_the_router(patch: Patch) -> None:
  """Half of the experts' router columns have no gradient."""
  change_grads(patch, lambda path, g: g.at[..., ::2].set(0) if 'moe/router' in path else g)


def router_gradient_a_percent_off(patch: Patch) -> None:
  """The router's gradient is 1.01 times what it should be."""
  change_grads(patch, lambda path, g: 1.01 * g if 'moe/router' in path else g)


def combine_weights_without_gradient(patch: Patch) -> None:
  """The language model's loss does not reach the router through the combine weights."""

  def make(mixture: Callable) -> Callable:
    def changed(self: layer.MoE, x: Array, routing: Routing, *rest: object) -> tuple[Array, Array]:
      return mixture(
        self, x, routing._replace(weights=jax.lax.stop_gradient(routing.weights)), *rest
      )

    return changed

  wrap(patch, 'mixture', make, layer.MoE)


def z_loss_without_the_head(patch: Patch) -> None:
  """The z-loss has no gradient to the head."""

  def make(entropy: Callable) -> Callable:
    def changed(h: Array, head: Array, *rest: object, chunks: int) -> tuple[Array, object]:
      *others, z_coef = rest
      held = jax.lax.stop_gradient(head)
      plain, parts = entropy(h, head, *others, 0 * z_coef, chunks)
      with_z = entropy(h, held, *others, z_coef, chunks)[0]
      return plain + with_z - entropy(h, held, *others, 0 * z_coef, chunks)[0], parts

    return changed

  wrap(patch, 'cross_entropy', make, objective)


def z_loss_not_differentiated(patch: Patch) -> None:
  """The z-loss is in the objective, and has no gradient."""

  def make(entropy: Callable) -> Callable:
    def changed(*args: object, chunks: int) -> tuple[Array, object]:
      *others, z_coef = args
      plain, parts = entropy(*others, 0 * z_coef, chunks)
      return plain + jax.lax.stop_gradient(entropy(*args, chunks)[0] - plain), parts

    return changed

  wrap(patch, 'cross_entropy', make, objective)


def mtp_not_differentiated(patch: Patch) -> None:
  """Multi-token prediction trains its own block's head, and nothing before it."""

  def make(terms: Callable) -> Callable:
    def changed(hidden: tuple[Array, ...], *rest: object, **named: object) -> object:
      first, *others = hidden
      return terms((first, *map(jax.lax.stop_gradient, others)), *rest, **named)

    return changed

  wrap(patch, 'lm_terms', make, objective)


def importance_detached(patch: Patch) -> None:
  """One of the losses is logged, added, and not differentiated."""

  def make(terms: Callable) -> Callable:
    def changed(aux: object, *rest: object) -> tuple[Array, dict]:
      held = jax.lax.stop_gradient(aux.losses['importance'])
      return terms(aux._replace(losses=aux.losses | {'importance': held}), *rest)

    return changed

  wrap(patch, 'balance_terms', make, objective)


def shifted_coefficients(patch: Patch, by: int) -> None:
  """Coefficients of another step."""

  def make(coefficients: Callable) -> Callable:
    return lambda cfg, step: coefficients(cfg, step + by)

  wrap(patch, 'coefficients', make, gradient_accumulation)


def coefficients_a_step_early(patch: Patch) -> None:
  """Coefficients are those of the next step."""
  shifted_coefficients(patch, 1)


def coefficients_a_step_late(patch: Patch) -> None:
  """Coefficients are those of the step before."""
  shifted_coefficients(patch, -1)


def logged_with_coefficient(patch: Patch) -> None:
  """Balance losses are logged with their coefficients."""

  def make(terms: Callable) -> Callable:
    def changed(aux: object, scale: dict, coefs: dict) -> tuple[Array, dict]:
      total, logged = terms(aux, scale, coefs)
      return total, {name: coefs[name] * value for name, value in logged.items()}

    return changed

  wrap(patch, 'balance_terms', make, objective)


def norm_after_clipping(patch: Patch) -> None:
  """The norm that is logged is that of the clipped gradient."""

  def change(before: TrainState, after: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    return after, metrics | {'grad_norm': jnp.minimum(metrics['grad_norm'], 4.0)}

  change_step(patch, change)


def interference_sign(patch: Patch) -> None:
  """The interference meter has the sign of agreement where there is conflict."""

  def make(forward: Callable) -> Callable:
    def changed(*args: object, **named: object) -> objective.ForwardPass:
      found = forward(*args, **named)
      return found._replace(balance=-found.balance)

    return changed

  wrap(patch, 'forward', make, gradient_interference)


def interference_places(patch: Patch) -> None:
  """The interference meter takes the trunk for the router."""

  def make(leaves: Callable) -> Callable:
    return lambda grads, is_router: leaves(grads, not is_router)

  wrap(patch, 'leaves_at', make, gradient_interference)


def interference_without_coefficients(patch: Patch) -> None:
  """The interference meter leaves out the coefficients of this step."""

  def make(coefficients: Callable) -> Callable:
    return lambda cfg, step: {k: jnp.ones(()) for k in coefficients(cfg, step)}

  wrap(patch, 'coefficients', make, gradient_interference)


GRADIENTS: dict[str, Mutant] = {
  'frozen router': Mutant(frozen_router, 'logged'),
  'frozen embedding': Mutant(frozen_embedding, 'logged'),
  'gradient of the embedding alone': Mutant(only_the_embedding, 'logged'),
  'frozen norms': Mutant(frozen_norms, 'logged'),
  'frozen shared gate': Mutant(frozen_shared_gate, 'logged'),
  'one expert frozen': Mutant(one_expert_frozen, 'logged'),
  'last layer frozen': Mutant(last_layer_frozen, 'logged'),
  'half of the router': Mutant(half_of_the_router, 'logged'),
  'router gradient a percent off': Mutant(router_gradient_a_percent_off, 'logged'),
  'combine weights without gradient': Mutant(combine_weights_without_gradient, 'logged'),
  'z-loss without the head': Mutant(z_loss_without_the_head, 'logged'),
  'z-loss not differentiated': Mutant(z_loss_not_differentiated, 'logged'),
  'MTP not differentiated': Mutant(mtp_not_differentiated, 'logged'),
  'importance detached': Mutant(importance_detached, 'logged'),
  'coefficients a step early': Mutant(coefficients_a_step_early, 'logged'),
  'coefficients a step late': Mutant(coefficients_a_step_late, 'logged'),
  'logged with coefficient': Mutant(logged_with_coefficient, 'logged'),
  'norm after clipping': Mutant(norm_after_clipping, 'logged'),
  'interference sign': Mutant(interference_sign, 'logged'),
  'interference places': Mutant(interference_places, 'logged'),
  'interference without coefficients': Mutant(interference_without_coefficients, 'logged'),
}
