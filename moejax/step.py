"""One optimiser step as a pure function: no I/O, no clock, no randomness.

  batch -> micro-batches -> objective = sum of parts, each already divided by the whole batch's count
        -> gradients added up -> clip, AdamW -> parameters;   load added up -> bias rule -> router

Every term is divided by a count of the *whole* batch (tokens, documents, sets of rows), known from masks before the
first micro-batch is differentiated. So the parts simply add: value and gradient do not depend on how the batch is cut.

Letters: A micro-batches, B batch, S sequence, E experts, L MoE layers.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import optax

from moejax.data import Batch
from moejax.experiment import ExperimentConfig
from moejax.losses import cross_entropy
from moejax.moe.balance import shares, spans_micro_batches
from moejax.moe.bias import BIAS_RULES, zeros
from moejax.optim import learning_rate, optimizer, piecewise, updates_made
from moejax.sharding import platform
from moejax.transformer import Transformer

Metrics = dict[str, Array]


class TrainState(NamedTuple):
  """All that a run carries from step to step."""

  step: Array                 # scalar i32, steps taken, skipped ones included
  model: Transformer
  opt_state: optax.OptState
  router: Array               # [L, E] f32, the bias of each MoE layer: no parameter, no gradient, moved once a step


class Sums(NamedTuple):
  """What micro-batches add up to."""

  loss: Array                 # the objective: what is differentiated
  terms: Metrics              # its terms, by the names they are logged under, coefficients left out
  load: Array                 # [L, E] f32
  dropped: Array              # scalar f32, mean over layers of the fraction dropped, by tokens


def build_model(key: Array, cfg: ExperimentConfig) -> Transformer:
  """A freshly initialised model that computes the balance losses of the config."""
  return Transformer(key, cfg.model, cfg.balance.scopes(cfg.batch_size, cfg.micro_batches))


def init_state(cfg: ExperimentConfig) -> TrainState:
  """The state before the first step; every number follows from cfg.seed."""
  model = build_model(jax.random.key(cfg.seed), cfg)
  experts = cfg.model.moe.router.num_experts
  router = jnp.stack([init_bias(cfg)(experts)] * cfg.model.num_moe_layers)
  return TrainState(jnp.zeros((), jnp.int32), model, optimizer(cfg.optim, cfg.steps).init(model), router)


def init_bias(cfg: ExperimentConfig) -> Callable[[int], Array]:
  """num_experts -> the bias to begin with; zeros also where there is no rule."""
  return BIAS_RULES[cfg.balance.bias_rule].init if cfg.balance.bias_rule else zeros


def cut(batch: Batch, micro_batches: int) -> Batch:
  """Rows in A contiguous parts. [B, ...] -> [A, B / A, ...]."""
  return jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), batch)


def micro_sums(model: Transformer, router: Array, batch: Batch, scale: Metrics, set_loads: Metrics,
               coefs: Metrics, cfg: ExperimentConfig) -> tuple[Array, Sums]:
  """The part of the objective that one micro-batch is.

  scale: term -> what the micro-batch's mean (or, for 'tokens', its sum) is multiplied by to be its part.
  """
  out = model(batch, router, set_loads=set_loads)
  weights = batch.mask * scale['tokens']
  loss, parts = cross_entropy(out.hidden, model.head_weights(), batch.targets, weights, cfg.loss)
  terms = {'lm_loss': (weights * parts.nll).sum(), 'z_loss': (weights * jnp.square(parts.log_z)).sum()}
  for name, values in out.aux.losses.items():
    terms[f'balance/{name}'] = scale[name] * values.mean()   # [L] -> mean over MoE layers, the one declared reduction
    loss = loss + coefs[name] * terms[f'balance/{name}']
  dropped = scale['load'] * out.aux.dropped.mean()
  return loss, Sums(loss, terms, out.aux.load, dropped)


def part_scales(parts: Batch, cfg: ExperimentConfig) -> Metrics:
  """What each micro-batch's terms are multiplied by, from masks alone: term -> [A] f32."""
  valid = parts.segment_ids > 0
  by_tokens = valid.sum((1, 2)) / jnp.maximum(valid.sum(), 1)
  per_token = jnp.broadcast_to(1.0 / jnp.maximum(parts.mask.sum(), 1), by_tokens.shape)
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  return {'tokens': per_token, 'load': by_tokens} | {
    name: shares(name, valid, parts.segment_ids, scope) for name, scope in scopes.items()}


def whole_set_loads(state: TrainState, parts: Batch, cfg: ExperimentConfig) -> Metrics:
  """For losses whose sets span micro-batches: the load of each one's whole set. loss -> [A, L, E].

  A forward pass that only counts, as many as there are micro-batches; without such losses, nothing.
  """
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  micro_rows = parts.tokens.shape[1]
  spanning = spans_micro_batches(scopes, micro_rows)
  if not spanning:
    return {}
  # Any load will do here: the counts do not depend on the losses.
  some = dict.fromkeys(spanning, jnp.zeros_like(state.router))
  counted = jax.lax.map(lambda part: state.model(part, state.router, set_loads=some).aux.counted, parts)
  return {name: pooled(counted, scopes[name].rows // micro_rows) for name in spanning}


def pooled(counted: Array, parts_in_set: int) -> Array:
  """Each micro-batch's counts replaced by the sum over its set. [A, L, E] -> [A, L, E]."""
  sums = counted.reshape(-1, parts_in_set, *counted.shape[1:]).sum(1)
  return jnp.repeat(sums, parts_in_set, axis=0)


def gradients(state: TrainState, batch: Batch, cfg: ExperimentConfig) -> tuple[Transformer, Sums]:
  """Gradient of the objective over the whole batch, and its terms."""
  parts = cut(batch, cfg.micro_batches)
  scopes = cfg.balance.scopes(cfg.batch_size, cfg.micro_batches)
  coefs = {name: piecewise(cfg.balance.losses[name], cfg.steps)(state.step) for name in scopes}
  differentiate = jax.grad(functools.partial(micro_sums, coefs=coefs, cfg=cfg), has_aux=True)
  xs = (parts, part_scales(parts, cfg), whole_set_loads(state, parts, cfg))

  def one(x: tuple[Batch, Metrics, Metrics]) -> tuple[Transformer, Sums]:
    return differentiate(state.model, state.router, *x)

  if cfg.micro_batches == 1:
    return one(jax.tree.map(lambda a: a[0], xs))
  start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, jax.tree.map(lambda a: a[0], xs)))
  return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, one(x)), None), start, xs)[0]


def train_step(state: TrainState, batch: Batch, cfg: ExperimentConfig) -> tuple[TrainState, Metrics]:
  """One step. A non-finite objective or gradient changes nothing but the step count: `skipped` is 1 then."""
  grads, sums = gradients(state, batch, cfg)
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
  tx = optimizer(cfg.optim, cfg.steps)

  def apply() -> tuple[Transformer, optax.OptState, Array]:
    updates, opt_state = tx.update(grads, state.opt_state, state.model)
    return optax.apply_updates(state.model, updates), opt_state, move_bias(state.router, sums.load, state.step, cfg)

  def skip() -> tuple[Transformer, optax.OptState, Array]:
    return state.model, state.opt_state, state.router

  new = TrainState(state.step + 1, *jax.lax.cond(finite, apply, skip))
  metrics = sums.terms | {
    'loss': sums.loss, 'grad_norm': grad_norm, 'load': sums.load, 'dropped': sums.dropped,
    'skipped': ~finite, 'skipped_total': new.step - updates_made(new.opt_state),
    'learning_rate': learning_rate(cfg.optim, cfg.steps)(updates_made(state.opt_state)),
    'router_bias_max': jnp.abs(new.router).max()}
  return new, metrics


def compile_step(cfg: ExperimentConfig, state: TrainState, batch: Batch) -> jax.stages.Compiled:
  """`train_step` compiled for these shapes (ShapeDtypeStructs will do); the old state's memory becomes the new one's.

  On CPU, XLA's memory-saving order takes a quarter off the temporaries; its default one lets virtual devices wait for
  each other forever, at two collectives that they meet in different orders.
  """
  options = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'} if platform() == 'cpu' else {}
  step = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0, compiler_options=options)
  return step.lower(state, batch).compile()


def move_bias(router: Array, load: Array, step: Array, cfg: ExperimentConfig) -> Array:
  """The router bias after a step in which the whole batch loaded experts so. [L, E], [L, E] -> [L, E]."""
  if not cfg.balance.bias_rule:
    return router
  rate = piecewise(cfg.balance.bias_rate, cfg.steps)(step)
  update = BIAS_RULES[cfg.balance.bias_rule].update
  return jax.vmap(lambda bias, count: update(bias, count, rate))(router, load)


def eval_step(model: Transformer, router: Array, batch: Batch, cfg: ExperimentConfig) -> Metrics:
  """Sums over one batch: `nll` in nats, `tokens` predicted, `load` [L, E]. Moves nothing."""
  out = model(batch, router, set_loads=dict.fromkeys(
    spans_micro_batches(model.blocks.moe.scopes, batch.tokens.shape[0]), jnp.zeros_like(router)))
  weights = batch.mask.astype(jnp.float32)
  nll, _ = cross_entropy(out.hidden, model.head_weights(), batch.targets, weights, cfg.loss)
  return {'nll': nll, 'tokens': weights.sum(), 'load': out.aux.load}
