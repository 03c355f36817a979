"""One optimiser step as a pure function: no I/O, no clock, and randomness only as a function of (seed, step).

  batch -> gradients of the objective -> clip, AdamW -> parameters;   what routers saw -> bias rule -> router

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, R tasks.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.config.schedule import piecewise
from moejax.data.batch import Batch
from moejax.model.cross_entropy import cross_entropy
from moejax.model.transformer import Transformer
from moejax.moe.bias import BIAS_RULES, BiasState
from moejax.moe.statistics import bias_statistics, layer_statistics, token_statistics
from moejax.runtime.faults import inject
from moejax.sharding.logical_axes import platform, replicated
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import learning_rate, optimizer, updates_made
from moejax.train.step.gradient_accumulation import gradients
from moejax.train.step.objective import Sums, Terms, positive, sum_by_task
from moejax.train.step.spikes import spike_limit, update_stability
from moejax.train.step.train_state import TrainState

Metrics = dict[str, Array | dict[str, Array]]


def train_step(
  state: TrainState, batch: Batch, cfg: ExperimentConfig
) -> tuple[TrainState, Metrics]:
  """One step. A non-finite objective or gradient changes nothing but the step count: `skipped` is 1 then. With
  optim.skip_spikes a spike does the same, but for the trend that spikes are measured from."""
  grads, sums, seen, gaps = gradients(state, batch, cfg)
  grads = inject('gradient', grads, state.step + 1)
  loss, lm_loss = inject('loss', (sums.loss, sums.terms['lm_loss']), state.step + 1)
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  good = finite & ~spiking(state, lm_loss, grad_norm, cfg) if cfg.optim.skip_spikes else finite
  tx = optimizer(cfg.optim, cfg.steps)

  def apply() -> tuple[Transformer, optax.OptState, BiasState, Terms]:
    updates, opt_state = tx.update(grads, state.opt_state, state.model)
    return (
      optax.apply_updates(state.model, updates),
      opt_state,
      update_router_bias(state.router, sums.seen, state.step, cfg),
      {name: seen[name] for name in state.lagged},
    )

  def skip() -> tuple[Transformer, optax.OptState, BiasState, Terms]:
    return state.model, state.opt_state, state.router, state.lagged

  stability, trend = update_stability(state.stability, lm_loss, grad_norm, ~finite)
  new = TrainState(state.step + 1, *jax.lax.cond(good, apply, skip), stability)
  metrics = (
    sums.terms
    | trend
    | {f'f_gap/{name}': gap for name, gap in gaps.items()}
    | {
      'lm_loss': lm_loss,
      'loss': loss,
      'grad_norm': grad_norm,
      'load': sums.load,
      'layers': statistics(sums, state.router, cfg),
      'skipped': ~good,
      'skipped_total': new.step - updates_made(new.opt_state),
      'learning_rate': learning_rate(cfg.optim, cfg.steps)(updates_made(state.opt_state)),
    }
  )
  return new, replicated(metrics | task_losses(sums.nll, task_tokens(batch, cfg), cfg))


def spiking(state: TrainState, lm_loss: Array, grad_norm: Array, cfg: ExperimentConfig) -> Array:
  """Whether the loss or the gradient's norm is further above its trend than optim.skip_spikes allows. Scalar bool."""
  return (
    jnp.stack([lm_loss, grad_norm]) > spike_limit(state.stability, cfg.optim.skip_spikes)
  ).any()


def statistics(sums: Sums, router: BiasState, cfg: ExperimentConfig) -> Terms:
  """Everything that is known of each MoE layer. name -> [L]."""
  return (
    layer_statistics(sums.load, cfg.model.moe.router.top_k)
    | token_statistics(sums.stats)
    | bias_statistics(router.bias)
    | {'dropped': sums.dropped}
  )


def task_tokens(batch: Batch, cfg: ExperimentConfig) -> Array:
  """Tokens to predict, of each task. [R] f32."""
  return sum_by_task(jnp.ones(batch.mask.shape), batch, cfg)


def task_losses(nll: Array, tokens: Array, cfg: ExperimentConfig) -> Terms:
  """nll: mean over all tokens, unweighted; of several tasks also lm_loss/TASK, NaN where a batch has none of it."""
  each = jnp.where(tokens > 0, nll / positive(tokens), jnp.nan)
  named = (
    {f'lm_loss/{task}': each[i] for i, task in enumerate(cfg.data.tasks)}
    if len(cfg.data.tasks) > 1
    else {}
  )
  return {'nll': nll.sum() / positive(tokens.sum())} | named


def compile_step(cfg: ExperimentConfig, state: TrainState, batch: Batch) -> jax.stages.Compiled:
  """`train_step` compiled for these shapes (ShapeDtypeStructs will do); the old state's memory becomes the new one's.

  On CPU, XLA's memory-saving order takes a quarter off the temporaries; its default one lets virtual devices wait for
  each other forever, at two collectives that they meet in different orders.
  """
  options = (
    {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'} if platform() == 'cpu' else {}
  )
  step = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0, compiler_options=options)
  return step.lower(state, batch).compile()


def update_router_bias(
  router: BiasState, seen: Array, step: Array, cfg: ExperimentConfig
) -> BiasState:
  """The router bias after a step in which the whole batch was seen so. [L, E], [L, ...] -> [L, E]."""
  if not cfg.balance.bias_rule:
    return router
  rate = piecewise(cfg.balance.bias_rate, cfg.steps)(step)
  update = BIAS_RULES[cfg.balance.bias_rule].update
  return jax.vmap(lambda state, layer: update(state, layer, rate, cfg.model.moe.router.top_k))(
    router, seen
  )


def eval_step(
  model: Transformer, router: BiasState, batch: Batch, cfg: ExperimentConfig
) -> Metrics:
  """Sums over one batch, of each task: `task_nll` in nats, `task_tokens` predicted; and of each layer: `load` [L, E],
  `stats`; also the `expert_ids` [L, B, S, K]. Moves nothing, and nothing is random."""
  out = model(batch, router.bias)
  _, parts = cross_entropy(
    out.hidden,
    model.head_weights(),
    batch.targets,
    batch.mask.astype(jnp.float32),
    0.0,
    cfg.loss.chunks,
  )
  return {
    'task_nll': sum_by_task(parts.nll, batch, cfg),
    'task_tokens': task_tokens(batch, cfg),
    'load': out.aux.load,
    'stats': out.aux.stats,
    'expert_ids': out.aux.expert_ids,
  }
