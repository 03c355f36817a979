"""How far moejax is from the golden of a family: logits, weights, gradients, steps, greedy text.

Deviations are absolute for logits and weights, and relative for the rest: |a - b| / |b| as vectors,
of each parameter. Letters: B batch, S sequence, V vocabulary, E experts.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.inference.sampling import SampleConfig, decode
from moejax.model.cross_entropy import LossConfig
from moejax.model.transformer import Transformer
from moejax.moe import layer as moe_layer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.routing import Routing
from moejax.sharding.logical_axes import spec
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig
from moejax.train.step.objective import targets_ahead
from moejax.train.step.train_state import init_state
from moejax.train.step.train_step import train_step
from tests.support.family_golden import CASES, Golden, Tree, batch_of, published
from tests.support.quick import QUICK
from tests.support.unoptimised import unoptimised

STEPS = 6  # of AdamW, that the goldens hold


def mean_nll(model: Transformer, hidden: jax.Array, batch: Batch, rows: int) -> jax.Array:
  """The mean cross entropy of the first `rows` rows, from all logits."""
  logits, targets, mask = model.logits(hidden[:rows]), batch.targets[:rows], batch.mask[:rows]
  likely = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
  return jnp.where(mask, jax.nn.logsumexp(logits, -1) - likely, 0).sum() / mask.sum()


class Forward(NamedTuple):
  """What one pass over some rows gives."""

  logits: jax.Array  # [B, S, V]
  mtp_logits: list[jax.Array]  # of each depth, [B, S, V]
  loss: jax.Array  # cross entropy of the first rows, and the mean of that of all depths
  gradient: Transformer


@functools.partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def forward(model: Transformer, router: jax.Array, batch: Batch, rows: int) -> Forward:
  """The loss is of the first `rows` rows only."""

  def loss(model: Transformer) -> tuple[jax.Array, tuple]:
    out = model(batch, router)
    deeper = [
      mean_nll(model, h, targets_ahead(batch, depth), rows)
      for depth, h in enumerate(out.mtp_hidden, 1)
    ]
    total = mean_nll(model, out.hidden, batch, rows) + sum(deeper) / max(1, len(deeper))
    return total, (model.logits(out.hidden), [model.logits(h) for h in out.mtp_hidden])

  (total, logits), gradient = jax.value_and_grad(loss, has_aux=True)(model)
  return Forward(*logits, total, gradient)


# One list for all: a compiled program goes on writing to the list that it was traced with.
SEEN: list[np.ndarray] = []


@contextlib.contextmanager
def weights_seen() -> Iterator[list[np.ndarray]]:
  """Collects [B, S, E], what each layer that runs meanwhile multiplies its experts' outputs by."""
  original = moe_layer.route

  def spy(*args: object) -> Routing:
    routing = original(*args)
    each = jax.nn.one_hot(routing.expert_ids, routing.logits.shape[-1]) * routing.weights[..., None]
    jax.debug.callback(lambda a: SEEN.append(np.asarray(a)), each.sum(-2), ordered=True)
    return routing

  SEEN.clear()
  moe_layer.route = spy
  try:
    yield SEEN
    jax.effects_barrier()
  finally:
    moe_layer.route = original


def relative(a: np.ndarray, b: np.ndarray) -> float:
  """|a - b| / |b|, as vectors."""
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Wanted(NamedTuple):
  """What the golden has of one pass over all cases."""

  logits: np.ndarray  # [B, S, V]
  mtp_logits: list[np.ndarray]  # of each depth d, [B, S - d, V]
  loss: float
  gradient: Tree  # by names of the file


def wanted_forward(golden: Golden) -> Wanted:
  """The recorded numbers of the model, with those of multi-token prediction, where it has that."""
  recorded, gradient = golden.recorded('golden'), golden.recorded('grads')
  logits = np.concatenate([recorded[f'{case}logits'] for case in CASES])
  loss, deeper = recorded['ce'], []
  if golden.cfg.mtp_depth:
    mtp = golden.recorded('mtp')
    loss = loss + mtp['loss']
    for depth in range(golden.cfg.mtp_depth):
      deeper.append(np.concatenate([mtp[f'{case}logits_{depth}'] for case in CASES]))
    # The golden has the gradient of the two losses apart; parameters that both use have the sum.
    for name, value in mtp.items():
      if name.startswith('grad/'):
        name = name.removeprefix('grad/')
        gradient[name] = gradient[name] + value if name in gradient else value
  return Wanted(logits, deeper, float(loss), gradient)


def combine_deviation(golden: Golden, real: np.ndarray) -> float:
  """Of the weights that experts' outputs are multiplied by, as SEEN holds them after a pass."""
  recorded = golden.recorded('golden')
  combine = np.concatenate([recorded[f'{case}combine'] for case in CASES], axis=1)
  layers = sum(golden.cfg.has_experts)
  return max(np.abs(a - b)[real].max() for a, b in zip(SEEN[:layers], combine, strict=True))


def of_forward(golden: Golden, mesh: Mesh | None = None) -> dict[str, float]:
  """Deviations of logits, combine weights and cross entropy in all three cases, and of the gradient
  of every parameter.

  On a mesh every row comes four times, so that eight devices have one or more each; no mean changes
  by that.
  """
  batch, times = batch_of(golden.recorded('golden'), CASES), 4 if mesh else 1
  rows = len(golden.recorded('golden')['tokens'])
  many = jax.tree.map(lambda a: np.repeat(a, times, axis=0), batch)
  with jax.set_mesh(mesh) if mesh else weights_seen():
    model = golden.model
    if mesh:
      model = jax.device_put(model, shardings(model, mesh))
      many = jax.device_put(many, NamedSharding(mesh, spec('batch')))
    out = jax.device_get(forward(model, golden.router, many, rows * times))
  wanted, real = wanted_forward(golden), batch.segment_ids > 0
  logits = [np.abs(out.logits[::times] - wanted.logits)[real].max()]
  for depth, (ours, theirs) in enumerate(zip(out.mtp_logits, wanted.mtp_logits, strict=True), 1):
    valid = real[:, :-depth] & real[:, depth:]
    logits.append(np.abs(ours[::times, :-depth] - theirs)[valid].max())
  found = {
    'logits': float(max(logits)),
    'loss': abs(float(out.loss) - wanted.loss) / wanted.loss,
  }
  if golden.routes and not mesh:
    found['weights'] = float(combine_deviation(golden, real))
  gradient = published(golden, out.gradient)
  assert set(gradient) == set(wanted.gradient), set(gradient) ^ set(wanted.gradient)
  apart = [relative(gradient[name], theirs) for name, theirs in wanted.gradient.items()]
  return found | {'gradient': max(apart)}


def steps_config(golden: Golden, batch: Batch) -> ExperimentConfig:
  """The config of the golden's optimiser steps: plain AdamW on the cross entropy alone."""
  about = golden.about['optimiser']
  rows, length = batch.tokens.shape
  beta1, beta2 = about['betas']
  return ExperimentConfig(
    steps=STEPS,
    batch_size=rows,
    seq_len=length,
    model=golden.cfg,
    loss=LossConfig(mtp_coef='0'),
    balance=BalanceConfig(losses=frozendict(), bias_rule=''),
    optim=OptimConfig(
      about['learning_rate'],
      0,
      'constant',
      beta1=beta1,
      beta2=beta2,
      eps=about['eps'],
      weight_decay=about['weight_decay'],
      clip_norm=about['clip_norm'],
    ),
  )


def of_steps(golden: Golden) -> dict[str, float]:
  """Deviation of the losses of six AdamW steps by the real training step, and of every parameter
  after them."""
  recorded, batch = golden.recorded('steps'), batch_of(golden.recorded('golden'), ('',))
  cfg = steps_config(golden, batch)
  # Moments are zeros at the start, like all else but the weights and the router bias. Zeros are
  # NumPy's: jnp.zeros would compile a program for every shape.
  shapes = jax.eval_shape(lambda: init_state(cfg))
  state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
  router = state.router._replace(bias=jnp.asarray(golden.router))
  state = state._replace(model=golden.model, router=router)
  step = jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK)
  losses, norms = [], []
  for _ in range(STEPS):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
    norms.append(float(metrics['grad_norm']))
  ours = published(golden, jax.device_get(state.model))
  theirs = {k.removeprefix('param/'): v for k, v in recorded.items() if k.startswith('param/')}
  assert {name for name in ours if name in theirs} == set(theirs)
  told = (
    relative(np.array(losses), recorded['losses']),
    relative(np.array(norms), recorded['grad_norms']),
  )
  return {
    'losses': max(told),
    'steps': max(relative(ours[name], value) for name, value in theirs.items()),
  }


def of_text(golden: Golden) -> dict[str, float]:
  """Tokens of the greedy continuation, of two prompts in one batch, that differ; also with drafts,
  where there are any.

  The golden's was made without a cache, a row at a time.
  """
  recorded = golden.recorded('golden')
  prompts = [row[:n].tolist() for row, n in zip(recorded['tokens'], recorded['greedy_lengths'])]
  model, wrong = jax.tree.map(jnp.asarray, golden.model), 0
  for draft in (False, True) if golden.cfg.mtp_depth else (False,):
    cfg = SampleConfig(max_tokens=recorded['greedy_tokens'].shape[1], temperature=0.0, draft=draft)
    with unoptimised():
      steps = [*decode(model, jnp.asarray(golden.router), prompts, cfg)]
    text = np.array([sum((step[row] for step in steps), []) for row in range(len(prompts))])
    wrong += (text != recorded['greedy_tokens']).sum()
  return {'text': float(wrong)}
