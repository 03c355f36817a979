"""The optimiser: optax's AdamW with decay mask, warm-up and decay of the rate, and global-norm clipping."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax import Array

from moejax.config import check
from moejax.config.schedule import piecewise, schedule_problem
from moejax.sharding.params import is_param


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW (Loshchilov & Hutter 2019). `warmup_steps` rise linearly to `learning_rate`, then `schedule` takes over.

  schedule: 'cosine' falls to `final_fraction` of the rate at the last step; 'wsd' stays, then falls linearly to it over
    the last `decay_fraction` of the steps; 'constant' stays; 'phases' is `phases` times the rate, where percentages are
    of the whole run, warm-up included ('1, cosine 0.1@60%, 0.03@90%', see moejax/schedule.py).
  weight_decay: of matrices, not of norms' scales.  clip_norm: largest global norm of the gradient; 0: off.
  skip_spikes: leave out a step whose loss or gradient norm is so many standard deviations above its trend, as one that
    is not finite is left out; 0: off. Below 4, noise alone does it; spikes are counted in any case.
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
    check(
      f'learning_rate={self.learning_rate}: use a number above 0'
      if self.learning_rate <= 0
      else '',
      f'schedule={self.schedule!r} is not one of {sorted(SCHEDULES)}'
      if self.schedule not in SCHEDULES
      else '',
      schedule_problem('phases', self.phases)
      if self.schedule == 'phases'
      else f"phases={self.phases!r} is read by schedule='phases' only: use it, or phases=''"
      if self.phases
      else '',
      *(
        f'{name}={value}: use 0 or more'
        for name, value in (
          ('warmup_steps', self.warmup_steps),
          ('weight_decay', self.weight_decay),
          ('clip_norm', self.clip_norm),
          ('skip_spikes', self.skip_spikes),
        )
        if value < 0
      ),
      *(
        f'{name}={value}: use 0 to 1'
        for name, value in (
          ('final_fraction', self.final_fraction),
          ('decay_fraction', self.decay_fraction),
        )
        if not 0 <= value <= 1
      ),
      *(
        f'{name}={value}: use 0 or more, below 1'
        for name, value in (('beta1', self.beta1), ('beta2', self.beta2))
        if not 0 <= value < 1
      ),
      f'eps={self.eps}: use a number above 0' if self.eps <= 0 else '',
    )


def cosine(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Half a cosine from the rate to its final fraction over `steps`."""
  return optax.cosine_decay_schedule(cfg.learning_rate, max(1, steps), alpha=cfg.final_fraction)


def wsd(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Warm-up, stable, decay (MiniCPM, 2404.06395): flat, then linear; a run can be prolonged from its stable part."""
  decay = round(cfg.decay_fraction * steps)
  final = cfg.learning_rate * cfg.final_fraction
  return optax.linear_schedule(
    cfg.learning_rate, final, max(1, decay), transition_begin=steps - decay
  )


def constant_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """The rate, at every step."""
  del steps
  return optax.constant_schedule(cfg.learning_rate)


def phases(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """The rate times what `cfg.phases` says, of all the steps, those of the warm-up before these among them."""
  factor = piecewise(cfg.phases, cfg.warmup_steps + steps)
  return lambda count: cfg.learning_rate * factor(cfg.warmup_steps + count)


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Update count -> learning rate. The first update has 1/warmup_steps of the full rate, not 0."""
  warmup = min(cfg.warmup_steps, steps)
  after = SCHEDULES[cfg.schedule](cfg, steps - warmup)
  if not warmup:
    return after
  rise = optax.linear_schedule(cfg.learning_rate / warmup, cfg.learning_rate, warmup - 1)
  return optax.join_schedules([rise, after], [warmup])


def decayed(params: object) -> object:
  """True for every parameter that weight decay shrinks: all but vectors, the scales of norms and biases."""
  return jax.tree.map(lambda p: p.get_metadata('axes')[-1] != 'norm', params, is_leaf=is_param)


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
  """The whole chain; `steps` is the length of the run, which the schedule needs."""
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  return optax.chain(
    clip,
    optax.adamw(
      learning_rate(cfg, steps),
      cfg.beta1,
      cfg.beta2,
      cfg.eps,
      weight_decay=cfg.weight_decay,
      mask=decayed,
    ),
  )


def updates_made(opt_state: optax.OptState) -> Array:
  """How many updates the optimiser has made, skipped steps not among them: where its schedule stands."""
  return optax.tree.get_all_with_path(opt_state, 'count')[0][1]


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
  'constant': constant_rate,
  'cosine': cosine,
  'phases': phases,
  'wsd': wsd,
}
