"""Do balance losses pull against the language model? Their gradients side by side, from one forward pass.

Letters: B batch, S sequence.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.data.batch import Batch
from moejax.model.transformer import Transformer
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.objective import (
  MicroBatch,
  Terms,
  coefficients,
  forward,
  part_scales,
  positive,
)
from moejax.train.step.train_state import TrainState


def interference(state: TrainState, batch: Batch, cfg: ExperimentConfig) -> Terms:
  """Norm of the balance gradient over that of the LM gradient, and their cosine, at the routers and at the trunk.

  The balance gradient is that of all balance losses with their coefficients of this step, router_z among them; the LM
  gradient that of everything else. A cosine near -1 at the trunk: what balance asks for is taken from the language
  model. 0 where one of the two is 0.

  The whole batch goes through the model at once, however many micro-batches a step has; nothing is random.

  Returns:
    router_ratio, router_cosine, trunk_ratio, trunk_cosine: scalars f32.
  """
  scales = part_scales(jax.tree.map(lambda a: a[None], batch), cfg.model.mtp_depth, cfg)
  part = MicroBatch(batch, jax.tree.map(lambda a: a[0], scales), {}, jnp.arange(cfg.batch_size))
  coefs = coefficients(cfg, state.step)

  def both(model: Transformer) -> tuple[Array, Array]:
    return forward(model, state.router.bias, part, None, coefs, cfg)[:2]

  (lm, balance), pull = jax.vjp(both, state.model)
  of_lm = pull((jnp.ones_like(lm), jnp.zeros_like(balance)))[0]
  of_balance = pull((jnp.zeros_like(lm), jnp.ones_like(balance)))[0]
  found = {}
  for place, is_router in (('router', True), ('trunk', False)):
    ours, theirs = (only(grads, is_router) for grads in (of_balance, of_lm))
    norm, lm_norm = optax.tree.norm(ours), optax.tree.norm(theirs)
    found[f'{place}_ratio'] = norm / positive(lm_norm)
    found[f'{place}_cosine'] = optax.tree.vdot(ours, theirs) / positive(norm * lm_norm)
  return found


def only(grads: Transformer, is_router: bool) -> dict[str, Array]:
  """The leaves that logits of experts are made with, or all others, by path."""
  named = [
    (jax.tree_util.keystr(keys, simple=True, separator='/'), leaf)
    for keys, leaf in jax.tree.leaves_with_path(grads)
  ]
  return {
    path: leaf
    for path, leaf in named
    if any(name in path for name in ('moe/router', 'moe/noise')) is is_router
  }
