"""The MoE layer in float64, by the oracle: output, choice and losses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.layer import MoEConfig
from moejax.moe.selection import JITTER, NOISE, draw_by_token
from tests.moe.layer_cases import MICRO_BATCHES, NOISY, B, D, F, Given, S, given, given_to, key_of
from tests.support import oracle


class Wanted(NamedTuple):
  y: np.ndarray
  losses: dict[str, float]
  logits: np.ndarray  # [B, S, E], noise included
  expert_ids: np.ndarray  # [B, S, K]
  best_ids: np.ndarray  # [B, S, K], by the scores alone
  kept: np.ndarray  # [T, K]


@functools.cache
def draws(num_experts: int) -> tuple[np.ndarray, np.ndarray]:
  """The jitter [B, S, D] and the noise [B, S, E] of the key.

  What is drawn is not in question, but what it does.
  """
  tokens = given(num_experts).tokens(key_of(NOISY))
  jitter = draw_by_token(
    lambda key: jax.random.uniform(key, (D,), jnp.float32, 0.7, 1.3), tokens, JITTER
  )
  noise = draw_by_token(lambda key: jax.random.normal(key, (num_experts,)), tokens, NOISE)
  return np.asarray(jitter, np.float64), np.asarray(noise, np.float64)


def chosen_by(cfg: MoEConfig, logits: np.ndarray, g: Given) -> np.ndarray:
  r, logs = cfg.router, oracle.log_scores(logits, cfg.router.score_fn)
  choice = np.exp(logs) + g.bias
  if r.num_groups > 1:
    choice = np.apply_along_axis(
      oracle.limited_to_groups, -1, choice, r.num_groups, r.top_groups, 2
    )
  return oracle.SELECTIONS[r.selection](logs, choice, g.mask, g.ids, r.top_k)


FFNS = {
  'swiglu': oracle.swiglu,
  'clamped_swiglu': functools.partial(oracle.clamped_swiglu, limit=1.5),
}


def oracle_layer(
  cfg: MoEConfig, p: dict[str, np.ndarray], x: np.ndarray, like: Wanted | None = None
) -> Wanted:
  """The layer in float64.

  Where a slope is to be taken, who goes where and who is dropped is as in `like`.
  """
  r, g, x = cfg.router, given_to(cfg), np.asarray(x, np.float64)
  x = np.where(g.mask[..., None], x, 0)  # what padding holds is taken for 0
  jitter, noise = draws(r.num_experts) if r.noisy else (1.0, 0.0)
  clean = x * jitter @ p['router']
  std = np.logaddexp(0, x * jitter @ p['noise']) if r.noisy else np.zeros_like(clean)
  if r.logit_bias:
    clean = clean + p['router_logit_bias']
  logits = clean + noise * std
  ids = like.expert_ids if like else chosen_by(cfg, logits, g)
  weighed_by = logits if r.weigh == 'softmax' else oracle.log_scores(logits, r.score_fn)
  weights = oracle.weigh_chosen(weighed_by, ids, r.renormalise, r.scale)
  flat = ids.reshape(B * S, -1)
  kept = like.kept if like else g.mask.reshape(-1, 1) & (flat < r.num_experts)
  if cfg.dispatch.capacity_factor and not like:
    room = oracle.capacity_of(B * S, r.num_experts, r.top_k, cfg.dispatch.capacity_factor)
    priority = np.take_along_axis(oracle.probabilities(logits, r.score_fn), ids, -1)
    kept = oracle.kept_copies(
      np.where(kept, flat, r.num_experts),
      priority.reshape(flat.shape),
      r.num_experts,
      room,
      cfg.dispatch.drop_by,
    )
  shared, width = [], cfg.d_shared or F
  for i in range(cfg.num_shared):  # one wide SwiGLU is as many experts side by side
    part = slice(i * width, (i + 1) * width)
    shared.append((p['shared.gate'][:, part], p['shared.up'][:, part], p['shared.down'][part]))
  kinds = ('', '_bias') if cfg.expert_bias else ('',)
  experts = [p[f'experts.{name}{kind}'] for kind in kinds for name in ('gate', 'up', 'down')]
  y = oracle.moe(
    x.reshape(B * S, D),
    flat,
    weights.reshape(flat.shape),
    experts,
    kept,
    shared,
    p['shared_gate'] if cfg.shared_gate else None,
    FFNS[cfg.activation],
  )
  best_ids = (
    like.best_ids
    if like
    else oracle_balance.assignment_of(logits, ids[..., : r.top_k], r.score_fn, 'unbiased')
  )
  return Wanted(
    y.reshape(B, S, D),
    losses_of(cfg, p, ids, best_ids, weights, (clean, logits, std)),
    logits,
    ids,
    best_ids,
    kept,
  )


def losses_of(
  cfg: MoEConfig,
  p: dict[str, np.ndarray],
  ids: np.ndarray,
  best_ids: np.ndarray,
  weights: np.ndarray,
  z: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> dict[str, float]:
  """z: clean and noisy logits, and the noise's standard deviation."""
  r, g = cfg.router, given_to(cfg)
  likely = oracle.likely(*z, r.top_k) if r.noisy else np.zeros(z[1].shape)
  found = {
    'router_z': oracle_balance.router_z(z[1], g.mask),
    'simbal': oracle_balance.simbal(p['router']),
    'importance': oracle_balance.importance(weights, ids, g.mask, r.num_experts),
    'load': oracle_balance.smooth_load(likely, g.mask),
  }
  for name in oracle_balance.SETS:
    sets = oracle_balance.sets_of(name, g.segments, micro_batches=MICRO_BATCHES)
    found[name] = oracle_balance.mean_over_sets(
      oracle_balance.probability_losses(
        oracle.probabilities(z[1], r.score_fn),
        ids[..., :1] if name == 'gshard' else best_ids,
        g.mask,
        sets,
      )
    )
  return found
