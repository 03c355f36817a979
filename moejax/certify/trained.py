"""Line 11, on whole training steps: what is trained moves as the optimiser says, and nothing else.

  gradient (which line 4 holds against differences) -> AdamW of the oracle | the step's parameters
  step number, update number -> schedules of the oracle | what the step used

The step is computed in float64, see `in_float64`, so that it must agree to 1e-7, whatever the
moments are.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.cases import Plan
from moejax.certify.checks import Check, Worst
from moejax.certify.oracle import optimizer as oracle
from moejax.certify.step_metrics import metrics_config
from moejax.config.schedule import piecewise
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import SCHEDULES, OptimConfig, learning_rate, optimizer
from moejax.train.step import spikes
from moejax.train.step import train_state as state
from moejax.train.step import train_step as step

# The optimiser's constants are float32: (1 - 0.95) is off by 1e-7 of it, and more where a small
# rate is the difference of two.
MOVED = 1e-6
RATE = 1e-6  # of a schedule's largest value, in float32
# Ends of the paths of vectors: scales of norms, biases and sinks, which do not decay.
VECTORS = ('scale/value', '/b/value', 'bias/value', 'sinks/value')
# One schedule of each kind of piece, and pieces of no step.
SCHEDULE_TEXTS = (
  '0.1',
  '0.1, 0.01@10%, 0.001@70%',
  '1, cosine 0.1@60%, 0.03@90%',
  '0, linear 1@3%, linear 0@50%, 0.5@50%, cosine 0@99%',
)


def rate_of(cfg: OptimConfig, steps: int) -> oracle.Rate:
  """What the oracle must know of a learning rate."""
  return oracle.Rate(
    peak=cfg.learning_rate,
    warmup=cfg.warmup_steps,
    shape=cfg.schedule,
    final=cfg.final_fraction,
    decay=cfg.decay_fraction,
    phases=cfg.phases,
    steps=steps,
  )


def rule_of(cfg: OptimConfig, leaves: dict[str, np.ndarray]) -> oracle.AdamW:
  """What the oracle must know of the optimiser: all but vectors are decayed."""
  decay = {name: not name.endswith(VECTORS) for name in leaves}
  return oracle.AdamW(
    b1=cfg.beta1,
    b2=cfg.beta2,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    decay=decay,
    clip=cfg.clip_norm,
  )


def parameters(current: state.TrainState) -> dict[str, np.ndarray]:
  """The parameters of a state by path."""
  return {name: np.asarray(leaf) for name, leaf in tiny.named_leaves(current.model).items()}


def clipped_gradients(
  before: state.TrainState, after: state.TrainState, cfg: OptimConfig
) -> dict[str, np.ndarray]:
  """The gradient that the optimiser took in, from what it did to the first moments."""
  old, new = (
    tiny.named_leaves(optax.tree.get_all_with_path(one.opt_state, 'mu')[0][1])
    for one in (before, after)
  )
  b1 = cfg.beta1
  return {name: (np.asarray(new[name]) - b1 * np.asarray(old[name])) / (1 - b1) for name in new}


def check_updates(plan: Plan, cfg: ExperimentConfig) -> Iterator[Check]:
  """Checks that every leaf moves by AdamW's rule, in steps one after another."""
  moved = Worst(
    'parameters after each step, by AdamW', MOVED, 'of the largest move of the leaf; float64'
  )
  idle = Worst('leaves that do not move', 0, 'each has a gradient and a rate')
  clipped = Worst('norm of what the optimiser gets', MOVED, 'relative, of at most clip_norm')
  rates = Worst('learning rate of each step', RATE, 'of the largest; float32')
  before, rows = tiny.start_state(plan, cfg), tiny.batch_of(plan)
  # A large gradient, which is clipped, and then small ones.
  numbers = (tiny_config.step_alone('mtp_loss'), 0, 1)
  moments = oracle.no_moments(parameters(before))
  for update, number in enumerate(numbers):
    before = before._replace(step=jnp.int32(number))
    taken = tiny.take_step64(plan, cfg, before, rows)
    gradient = clipped_gradients(before, taken.after, cfg.optim)
    norm = float(taken.metrics['grad_norm'])
    clipped.see(
      f'step {number}, of norm {norm:.2g}',
      oracle.global_norm(gradient) / min(norm, cfg.optim.clip_norm) - 1,
    )
    rate = oracle.learning_rate(rate_of(cfg.optim, cfg.steps), update)
    rates.see(f'update {update}', (float(taken.metrics['learning_rate']) - rate) / rate)
    old = parameters(before)
    wanted, moments = oracle.adamw_step(
      old, moments, gradient, rate=rate, rule=rule_of(cfg.optim, old)
    )
    for name, new in parameters(taken.after).items():
      largest = float(np.abs(wanted[name] - old[name]).max())
      where = f'{name}; update {update}, step {number}'
      moved.see(where, float(np.abs(new - wanted[name]).max()) / largest)
      idle.see(where, bool((np.asarray(new) == old[name]).all()))
    before = taken.after
  for worst in (moved, idle, clipped, rates):
    yield worst.check()


def check_decay(cfg: ExperimentConfig) -> Iterator[Check]:
  """Checks which leaves shrink where no leaf has a gradient, and that nothing else moves."""
  shrunk = Worst('weight decay of every kind of leaf', 0, 'moved or not, where that is right')
  shapes = jax.eval_shape(functools.partial(state.init_state, cfg)).model
  # One number of each leaf is enough, and all leaves then share what is compiled.
  ones = jax.tree.map(lambda _: jnp.ones(1), shapes)
  zeros = jax.tree.map(lambda _: jnp.zeros(1), shapes)
  rule = optimizer(cfg.optim, cfg.steps)
  updates, _ = rule.update(zeros, rule.init(ones), ones, grad_norm=jnp.zeros(()))
  leaves = tiny.named_leaves(updates)
  wanted = rule_of(cfg.optim, leaves).decay
  for name, update in leaves.items():
    shrunk.see(name, (float(update[0]) < 0) != wanted[name])
  yield shrunk.check()


def check_schedules() -> Iterator[Check]:
  """Checks every kind of schedule at every step of a run."""
  coefficients = Worst('schedules at every step', RATE, 'of their largest value; float32')
  numbers = np.arange(tiny_config.STEPS + 1)
  for text in SCHEDULE_TEXTS:
    for steps in (tiny_config.STEPS, 37):
      found = np.asarray(jax.vmap(piecewise(text, steps))(jnp.arange(steps + 1)))
      wanted = [oracle.schedule_value(text, steps, number) for number in range(steps + 1)]
      error = np.abs(found - wanted).max() / max(wanted)
      coefficients.see(f'{text!r} over {steps} steps', error)
  rates = Worst('learning rates at every update', RATE, 'of the peak; float32')
  for name in sorted(SCHEDULES):
    for warmup in (0, 7):
      phases = SCHEDULE_TEXTS[2] if name == 'phases' else ''
      cfg = OptimConfig(learning_rate=0.01, schedule=name, warmup_steps=warmup, phases=phases)
      found = np.asarray(jax.vmap(learning_rate(cfg, tiny_config.STEPS))(jnp.asarray(numbers)))
      rate = rate_of(cfg, tiny_config.STEPS)
      wanted = [oracle.learning_rate(rate, int(number)) for number in numbers]
      rates.see(f'{name}, warmup_steps={warmup}', np.abs(found - wanted).max() / 0.01)
  yield coefficients.check()
  yield rates.check()


def differing(one: object, other: object) -> int:
  """How many entries of two trees are not the same bits."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in pairs)


def check_still(plan: Plan) -> Iterator[Check]:
  """Checks what must not move: in a skipped step, by evaluation, at a rate of 0."""
  skipped = Worst('moved in a skipped step', 0, 'the same bits, but for the number of the step')
  # Of micro-batches with f of the step before: its counts must stay, too.
  cfg, rows = metrics_config(), tiny.batch_of(plan)
  poisoned = tiny.start_state(plan, cfg)
  counts = jax.tree.map(lambda a: jnp.arange(a.size).reshape(a.shape), poisoned.lagged)
  poisoned = poisoned._replace(lagged=counts)
  scale = poisoned.model.norm.scale
  scale[...] = scale[...].at[0].set(jnp.inf)
  taken = tiny.take_step(plan, cfg, poisoned, rows)
  for part in ('model', 'opt_state', 'router', 'lagged'):
    moved = differing(getattr(taken.after, part), getattr(poisoned, part))
    # A step that was taken after all has not shown what a skipped one does.
    skipped.see(part, moved if taken.metrics['skipped'] else float('nan'))
  skipped.see('number of the step, less 1', int(taken.after.step) - int(poisoned.step) - 1)
  yield skipped.check()
  cfg = tiny_config.base_config()
  before = tiny.start_state(plan, cfg)
  evaluated = Worst('moved by evaluation', 0, 'the same bits after an evaluation and without')
  one = tiny.take_step(plan, cfg, before, rows)
  jax.block_until_ready(plan.program(step.eval_step, cfg)(before.model, before.router, rows))
  evaluated.see('everything', differing(tiny.take_step(plan, cfg, before, rows), one))
  yield evaluated.check()
  idle = Worst('moved at a rate of 0', 0, 'decay is times the rate, too')
  rich = tiny_config.rich_config()
  ended = tiny.start_state(plan, rich)
  # So many updates made that the cosine has come down to nothing.
  opt_state = jax.tree.map(
    lambda a: jnp.full_like(a, rich.steps) if a.dtype == jnp.int32 else a, ended.opt_state
  )
  still = tiny.take_step(plan, rich, ended._replace(opt_state=opt_state), rows)
  idle.see('parameters', differing(still.after.model, ended.model))
  yield idle.check()


def check_spike(plan: Plan) -> Iterator[Check]:
  """Checks a step that is left out because its loss is a spike: only the trend moves, by its rule.

  So a level that stays is let in later.
  """
  base, rows = tiny_config.base_config(), tiny.batch_of(plan)
  cfg = tiny_config.change(base, optim=dataclasses.replace(base.optim, skip_spikes=4.0))
  calm = spikes.Stability(
    steps=jnp.float32(199),
    trend=jnp.full(2, 0.5),
    gap=jnp.zeros(2),
    square=jnp.full(2, 1e-4),
    spikes=jnp.zeros(2),
  )
  before = tiny.start_state(plan, cfg)._replace(stability=calm)
  taken = tiny.take_step(plan, cfg, before, rows)
  still = Worst('moved in a step that is a spike', 0, 'the same bits')
  for part in ('model', 'opt_state', 'router'):
    moved = differing(getattr(taken.after, part), getattr(before, part))
    still.see(part, moved if taken.metrics['skipped'] else float('nan'))
  trend = Worst('trend after a spike', 1e-6, 'relative; float32')
  after = taken.after.stability
  # What is above the limit of a spike, of SIGMAS standard deviations of 0.01, counts as the limit.
  wanted = 0.5 + max(spikes.RATE, 1 / 200) * spikes.SIGMAS * 0.01
  trend.see('loss', float(after.trend[0]) / wanted - 1)
  trend.see('spikes, less 1', float(after.spikes[0]) - 1)
  trend.see('steps, less 200', float(after.steps) - 200)
  yield still.check()
  yield trend.check()


def trained_line(plan: Plan) -> Iterator[Check]:
  """Checks line 11."""
  yield from check_schedules()
  yield from check_updates(plan, tiny_config.rich_config())
  yield from check_decay(tiny_config.other_config())
  yield from check_still(plan)
  yield from check_spike(plan)
