"""One optimiser step as a pure function: no I/O, no clock, randomness only from (seed, step).

  batch -> gradients of the objective -> clip, AdamW -> parameters
  what the routers saw of the batch -> bias rule -> router bias

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, R tasks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

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
from moejax.sharding.params import constrain_params
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import learning_rate, optimizer, updates_made
from moejax.train.step.gradient_accumulation import gradients
from moejax.train.step.objective import Sums, Terms, positive, sum_by_task
from moejax.train.step.spikes import spike_limit, update_stability
from moejax.train.step.train_state import TrainState
from moejax.train.telemetry.routing_probe import probe_rows

Metrics = dict[str, Array | dict[str, Array]]


class Learned(NamedTuple):
  """The parts of a TrainState that a skipped step leaves as they are."""

  model: Transformer
  opt_state: optax.OptState
  router: BiasState  # [L, E] f32 each
  lagged: Terms  # loss -> [sets, L, E] i32


def train_step(
  state: TrainState, batch: Batch, cfg: ExperimentConfig
) -> tuple[TrainState, Metrics]:
  """One step: the next state, and what this step measured.

  A non-finite objective, gradient or update changes nothing but the step count: `skipped` is 1
  then. With optim.skip_spikes a spike does the same, but for the trend that spikes are measured
  from.
  """
  # 1. The gradient of the whole batch's objective, a micro-batch at a time.
  grads, sums, set_counts, f_gaps = gradients(state, batch, cfg)
  # The identity, and no part of the program, unless MOEJAX_FAULT asks for a fault at this step.
  grads = inject('gradient', grads, state.step + 1)
  loss, lm_loss = inject('loss', (sums.loss, sums.terms['lm_loss']), state.step + 1)

  # 2. Parameters follow the optimiser, the router bias follows its rule: it has no gradient.
  tx, grad_norm = optimizer(cfg.optim, cfg.steps), optax.tree.norm(grads)

  def learn() -> Learned:
    updates, opt_state = tx.update(grads, state.opt_state, state.model, grad_norm=grad_norm)
    return Learned(
      model=optax.apply_updates(state.model, updates),
      opt_state=opt_state,
      router=update_router_bias(state.router, sums.seen, state.step, cfg),
      lagged={name: set_counts[name] for name in state.lagged},
    )

  def skip() -> Learned:
    return Learned(state.model, state.opt_state, state.router, state.lagged)

  # 3. May this step be learned from? A finite gradient does not make a finite update: where it is
  # squared, divided or added to a parameter, numbers may overflow.
  # `learn` is worked out here, of which one bool is kept, and again in the branch below: that takes
  # a few percent of a step, where both states at once would take the memory of a second one.
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(learn())
  good = finite
  if cfg.optim.skip_spikes:
    good = finite & ~is_spike(state, lm_loss, grad_norm, cfg)

  # A spike that is skipped moves the trend all the same: a level that stays is then let in.
  stability, stability_metrics = update_stability(state.stability, lm_loss, grad_norm, ~finite)
  learned = one_of(good, learn, skip)
  new = state._replace(step=state.step + 1, stability=stability, **learned._asdict())

  # 4. What is logged of the step, the same on every device.
  metrics = {
    'lm_loss': lm_loss,
    'loss': loss,
    'grad_norm': grad_norm,
    'load': sums.load,
    'layers': statistics(sums, state.router, cfg),
    'skipped': ~good,
    'skipped_total': new.step - updates_made(new.opt_state),
    'learning_rate': learning_rate(cfg.optim, cfg.steps)(updates_made(state.opt_state)),
  }
  metrics |= {f'f_gap/{name}': gap for name, gap in f_gaps.items()}
  metrics |= task_losses(sums.nll, task_tokens(batch, cfg), cfg)
  # lm_loss is among the terms, too: the one above is what a fault may have made of it.
  return new, replicated(sums.terms | stability_metrics | metrics)


def one_of(good: Array, learn: Callable[[], Learned], skip: Callable[[], Learned]) -> Learned:
  """Returns what `learn` gives if good, else what `skip` gives, laid out as the state is.

  Left to itself, XLA's partitioner may gather all parameters and moments on the way out of a
  branch, as it does for GPUs.
  """
  return constrain_params(jax.lax.cond(good, learn, skip))


def all_finite(tree: Learned) -> Array:
  """Whether no number of any leaf is NaN or inf. Scalar bool."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def is_spike(state: TrainState, lm_loss: Array, grad_norm: Array, cfg: ExperimentConfig) -> Array:
  """Whether the loss or the gradient's norm is further above its trend than optim.skip_spikes
  standard deviations. Scalar bool."""
  limit = spike_limit(state.stability, cfg.optim.skip_spikes)
  return (jnp.stack([lm_loss, grad_norm]) > limit).any()


def statistics(sums: Sums, router: BiasState, cfg: ExperimentConfig) -> Terms:
  """Everything that is known of each MoE layer. name -> [L]."""
  router_cfg = cfg.model.moe.router
  return (
    layer_statistics(sums.load, router_cfg.top_k)
    | token_statistics(sums.stats, router_cfg.has_margin)
    | bias_statistics(router.bias)
    | {'dropped': sums.dropped / positive(sums.stats.copies)}
  )


def task_tokens(batch: Batch, cfg: ExperimentConfig) -> Array:
  """How many tokens are to be predicted, of each task. [R] i32."""
  none = jnp.zeros(len(cfg.data.tasks), jnp.int32)
  return none.at[batch.task_ids].add(batch.mask.sum(-1, dtype=jnp.int32))


def task_losses(nll: Array, tokens: Array, cfg: ExperimentConfig) -> Terms:
  """Mean losses by name, from sums [R] of nll and of tokens. Scalars.

  nll: the mean over all tokens, unweighted. Of several tasks there is also lm_loss/TASK for each,
  NaN and not 0 where the batch has no token of it.
  """
  by_task = jnp.where(tokens > 0, nll / positive(tokens), jnp.nan)
  losses = {'nll': nll.sum() / positive(tokens.sum())}
  if len(cfg.data.tasks) > 1:
    losses |= {f'lm_loss/{task}': by_task[i] for i, task in enumerate(cfg.data.tasks)}
  return losses


def compile_step(cfg: ExperimentConfig, state: TrainState, batch: Batch) -> jax.stages.Compiled:
  """`train_step` compiled for these shapes; ShapeDtypeStructs will do.

  The old state is donated: its memory becomes the new one's.
  """
  options = {}
  if platform() == 'cpu':
    # This order takes a quarter off the temporaries; XLA's default one lets virtual devices wait
    # for each other forever, at two collectives that they meet in different orders.
    options['xla_cpu_scheduler_type'] = 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
  step = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0, compiler_options=options)
  return step.lower(state, batch).compile()


def update_router_bias(
  router: BiasState, seen: Array, step: Array, cfg: ExperimentConfig
) -> BiasState:
  """The router bias after a step, by the rule of the config; without a rule it stays.

  Args:
    router: [L, E] f32 each.
    seen: [L, ...], what the rule observed of the whole batch.
    step: scalar i32, at which the schedule of the rate is read.
  """
  if not cfg.balance.bias_rule:
    return router
  rate = piecewise(cfg.balance.bias_rate, cfg.steps)(step)
  update = BIAS_RULES[cfg.balance.bias_rule].update
  top_k = cfg.model.moe.router.top_k
  return jax.vmap(lambda state, layer: update(state, layer, rate, top_k))(router, seen)


def eval_step(
  model: Transformer, router: BiasState, batch: Batch, cfg: ExperimentConfig
) -> Metrics:
  """Sums over one batch of held-out text. It changes no state, and nothing is random.

  Returns:
    Of each task [R]: `task_nll` in nats, `task_tokens` predicted. Of each token: `nll` [B, S], 0
    where nothing is to be predicted. Of each MoE layer: `load` [L, E], `stats` [L, ...], and the
    `expert_ids` [L, rows, S, K] of the first rows, which a probe takes.
  """
  out = model(batch, router.bias, rows_with_ids=probe_rows(batch.tokens.shape[1]))
  # Every token counts once: what training weighs tasks by is no part of a measurement.
  weights = batch.mask.astype(jnp.float32)
  head = model.head_weights()
  _, parts = cross_entropy(out.hidden, head, batch.targets, weights, 0.0, chunks=cfg.loss.chunks)
  return {
    'task_nll': sum_by_task(parts.nll, batch, cfg),
    'task_tokens': task_tokens(batch, cfg),
    'nll': jnp.where(batch.mask, parts.nll, 0.0),
    'load': out.aux.load,
    'stats': out.aux.stats,
    'expert_ids': out.aux.expert_ids,
  }
