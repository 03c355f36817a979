"""The optimiser: optax's AdamW with a decay mask, warm-up and decay of the rate, and clipping of
the global norm.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.config import above_zero, at_least, check, not_finite, not_one_of, problem_if
from moejax.config.decimals import decimal_of
from moejax.config.schedule import piecewise, schedule_problem
from moejax.sharding.params import is_param


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW (Loshchilov & Hutter 2019).

  learning_rate: what `warmup_steps` rise to linearly; then `schedule` takes over.
  schedule: 'cosine' falls to `final_fraction` of the rate at the last step; 'wsd' stays, then falls
    linearly to it over the last `decay_fraction` of the steps; 'constant' stays; 'phases' is
    `phases` times the rate, where percentages are of the whole run, warm-up included
    ('1, cosine 0.1@60%, 0.03@90%', see moejax/config/schedule.py).
  warmup_steps: steps in which the learning rate rises from 0.
  final_fraction: part of the learning rate that is left at the end, see `schedule`.
  decay_fraction: part of the steps in which 'wsd' falls.
  phases: the factor of the learning rate over the run, see `schedule`.
  beta1, beta2: decay of the moving means of the gradient and of its square.
  eps: what is added to the root of the second.
  weight_decay: of matrices, not of norms' scales.
  clip_norm: largest global norm of the gradient; 0: off.
  skip_spikes: leave out a step whose loss or gradient norm is so many standard deviations above its
    trend, as one that is not finite is left out; 0: off. Below 4, noise alone does it; spikes are
    counted in any case.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 50
  schedule: str = 'cosine'
  final_fraction: float = 0.1
  decay_fraction: float = 0.2
  phases: str = ''
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  skip_spikes: float = 0.0

  def __post_init__(self) -> None:
    check(*not_finite(self))
    check(
      *above_zero(self, 'learning_rate'),
      not_one_of('schedule', self.schedule, SCHEDULES),
      self._phases_problem(),
      *at_least(0, self, 'warmup_steps', 'weight_decay'),
      *at_least(0, self, 'clip_norm', 'skip_spikes'),
      *self._outside_of_0_to_1('final_fraction', 'decay_fraction'),
      *self._no_decay_rate('beta1', 'beta2'),
      *above_zero(self, 'eps'),
    )

  def _phases_problem(self) -> str:
    if self.schedule == 'phases':
      return schedule_problem('phases', self.phases)
    return problem_if(
      self.phases,
      f"phases={self.phases!r} is read by schedule='phases' only: use it, or phases=''",
    )

  def _outside_of_0_to_1(self, *fields: str) -> list[str]:
    values = {name: getattr(self, name) for name in fields}
    return [f'{name}={value}: use 0 to 1' for name, value in values.items() if not 0 <= value <= 1]

  def _no_decay_rate(self, *fields: str) -> list[str]:
    # At 1 an average of gradients would never move, and its bias correction divide by 0.
    values = {name: getattr(self, name) for name in fields}
    remedy = 'use 0 or more, below 1'
    return [f'{name}={value}: {remedy}' for name, value in values.items() if not 0 <= value < 1]


def cosine(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Half a cosine from the rate to its final fraction over `steps`."""
  return optax.cosine_decay_schedule(cfg.learning_rate, max(1, steps), alpha=cfg.final_fraction)


def wsd(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Warm-up, stable, decay (MiniCPM, 2404.06395): flat, then linear to the final fraction.

  A run can be prolonged from its stable part.
  """
  decay = round(decimal_of(cfg.decay_fraction) * steps)
  final = cfg.learning_rate * cfg.final_fraction
  return optax.linear_schedule(
    cfg.learning_rate, final, max(1, decay), transition_begin=steps - decay
  )


def constant_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """The rate, at every step."""
  del steps
  return optax.constant_schedule(cfg.learning_rate)


def phases(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """The rate times what `cfg.phases` says.

  Its percentages are of the whole run: of `steps`, and of the warm-up steps before them.
  """
  factor = piecewise(cfg.phases, cfg.warmup_steps + steps)
  return lambda count: cfg.learning_rate * factor(cfg.warmup_steps + count)


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Number of the update, from 0 -> learning rate, over a run of so many steps.

  The first update has 1/warmup_steps of the full rate, not 0: it would be wasted.
  """
  # A run shorter than its warm-up rises to the full rate all the same.
  warmup = min(cfg.warmup_steps, steps)
  after = SCHEDULES[cfg.schedule](cfg, steps - warmup)
  if not warmup:
    return after
  rise = optax.linear_schedule(cfg.learning_rate / warmup, cfg.learning_rate, warmup - 1)
  return optax.join_schedules([rise, after], [warmup])


def decay_mask(params: object) -> object:
  """True for every parameter that weight decay shrinks, as a tree of the parameters.

  That is all but vectors: the scales of norms, biases and sinks, whose last axis is `norm`.
  """
  return jax.tree.map(lambda p: p.get_metadata('axes')[-1] != 'norm', params, is_leaf=is_param)


def clip_by_known_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """Returns optax.clip_by_global_norm, but that `update` is given the norm, as `grad_norm`.

  A step measures the norm in any case: to compute it again would read the whole gradient again.
  """

  def update(
    grads: optax.Updates,
    state: optax.EmptyState,
    params: optax.Params | None = None,
    *,
    grad_norm: Array,
    **others: object,
  ) -> tuple[optax.Updates, optax.EmptyState]:
    del params, others
    fits = grad_norm < max_norm
    clipped = jax.tree.map(lambda g: jnp.where(fits, g, g / grad_norm * max_norm), grads)
    return clipped, state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
  """Clipping, then AdamW; its `update` also takes the `grad_norm` of the whole gradient.

  Args:
    cfg: rates, moments, decay and clipping.
    steps: the length of the run, which the schedule needs.
  """
  clip = clip_by_known_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  adamw = optax.adamw(
    learning_rate(cfg, steps),
    b1=cfg.beta1,
    b2=cfg.beta2,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    mask=decay_mask,
  )
  # Clipped before the moments take it in; the decay, which is decoupled, is not clipped.
  return optax.with_extra_args_support(optax.chain(clip, adamw))


def updates_made(opt_state: optax.OptState) -> Array:
  """How many updates the optimiser has made: where its schedule stands. Scalar i32.

  Skipped steps are not among them, so this is not the step of the run.
  """
  # AdamW and its schedule each count, and always the same.
  return optax.tree.get_all_with_path(opt_state, 'count')[0][1]


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
  'constant': constant_rate,
  'cosine': cosine,
  'phases': phases,
  'wsd': wsd,
}
