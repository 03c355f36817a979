"""Do balance losses pull against the language model? Their gradients side by side, from one forward
pass.

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
  """Norm of the balance gradient over that of the LM gradient, and their cosine, at two places.

  The places are the routers and the trunk, which is all else. The balance gradient is that of all
  balance losses with their coefficients of this step, router_z among them; the LM gradient that of
  everything else. A cosine near -1 at the trunk: what balance asks for is taken from the language
  model. 0 where one of the two is 0.

  The whole batch goes through the model at once, however many micro-batches a step has; nothing is
  random.

  Returns:
    router_ratio, router_cosine, trunk_ratio, trunk_cosine: scalars f32.
  """
  # Scales of a batch that is cut into one part: itself.
  scales = part_scales(jax.tree.map(lambda a: a[None], batch), cfg.model.mtp_depth, cfg)
  scale = jax.tree.map(lambda a: a[0], scales)
  part = MicroBatch(batch, scale, whole={}, rows=jnp.arange(cfg.batch_size))
  coefs = coefficients(cfg, state.step)

  def losses(model: Transformer) -> tuple[Array, Array]:
    result = forward(model, state.router.bias, part, None, coefs=coefs, cfg=cfg)
    return result.lm, result.balance

  # Two backward passes through one forward pass: each pulls one of the two losses back alone.
  (lm, balance), pull_back = jax.vjp(losses, state.model)
  lm_grads = pull_back((jnp.ones_like(lm), jnp.zeros_like(balance)))[0]
  balance_grads = pull_back((jnp.zeros_like(lm), jnp.ones_like(balance)))[0]
  found = {}
  for place, is_router in (('router', True), ('trunk', False)):
    balance_leaves = leaves_at(balance_grads, is_router)
    lm_leaves = leaves_at(lm_grads, is_router)
    norm, lm_norm = optax.tree.norm(balance_leaves), optax.tree.norm(lm_leaves)
    found[f'{place}_ratio'] = norm / positive(lm_norm)
    cosine = optax.tree.vdot(balance_leaves, lm_leaves) / positive(norm * lm_norm)
    found[f'{place}_cosine'] = cosine
  return found


def leaves_at(grads: Transformer, is_router: bool) -> dict[str, Array]:
  """The leaves that logits of experts are made with, or all others. By path."""
  leaves = {}
  for keys, leaf in jax.tree.leaves_with_path(grads):
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    makes_logits = 'moe/router' in path or 'moe/noise' in path
    if makes_logits is is_router:
      leaves[path] = leaf
  return leaves
