"""What the equations of schedules, of the learning rate and of AdamW say, in float64.

Letters: none; parameters and gradients are dicts of arrays, by the paths of their leaves.
"""

import math
from typing import NamedTuple

import numpy as np

from moejax.certify.oracle.routing import F64


def global_norm(gradients: dict[str, F64]) -> float:
  """The norm of all gradients as one vector."""
  return math.sqrt(
    math.fsum(float((np.asarray(g, np.float64) ** 2).sum()) for g in gradients.values())
  )


class Moments(NamedTuple):
  """What AdamW keeps, and how many updates it has made."""

  first: dict[str, F64]
  second: dict[str, F64]
  updates: int


class AdamW(NamedTuple):
  """The constants of AdamW (Loshchilov & Hutter 2019, Algorithm 2), and what is decayed."""

  b1: float
  b2: float
  eps: float
  weight_decay: float
  decay: dict[str, bool]
  clip: float  # largest global norm of the gradient; 0: off


def no_moments(params: dict[str, F64]) -> Moments:
  """The moments before the first update."""
  zeros = {name: np.zeros(np.shape(value)) for name, value in params.items()}
  return Moments(zeros, dict(zeros), 0)


def adamw_step(
  params: dict[str, F64],
  moments: Moments,
  gradients: dict[str, F64],
  *,
  rate: float,
  rule: AdamW,
) -> tuple[dict[str, F64], Moments]:
  """One update: the parameters and the moments after it.

  Clip to global norm, then bias-corrected moments, eps outside the square root; decay is decoupled,
  times the rate, and only where `decay` says so.
  """
  norm, n = global_norm(gradients), moments.updates + 1
  shrink = rule.clip / norm if 0 < rule.clip < norm else 1.0
  after, first, second = {}, {}, {}
  for name, value in params.items():
    p, g = np.asarray(value, np.float64), shrink * np.asarray(gradients[name], np.float64)
    first[name] = rule.b1 * moments.first[name] + (1 - rule.b1) * g
    second[name] = rule.b2 * moments.second[name] + (1 - rule.b2) * g**2
    root = np.sqrt(second[name] / (1 - rule.b2**n))
    update = first[name] / (1 - rule.b1**n) / (root + rule.eps)
    decay = rule.weight_decay * p if rule.decay[name] else 0.0
    after[name] = p - rate * (update + decay)
  return after, Moments(first, second, n)


def schedule_value(text: str, steps: int, step: int) -> float:
  """The value of a schedule such as '0.1, 0@10%, cosine 1@60%' at a step of a run of so many.

  A piece holds from its first step on, and one with a shape leaves from the value before it there,
  and arrives at its own where the next piece begins, or the run ends.
  """
  starts, values, shapes = [0], [], ['']
  for number, piece in enumerate(text.split(',')):
    body, _, start = piece.strip().partition('@')
    *shape, value = body.split()
    values.append(float(value))
    if number:
      starts.append(round(float(start.rstrip('%')) / 100 * steps))
      shapes.append(shape[0] if shape else '')
  now = max(i for i, start in enumerate(starts) if start <= step)
  if not shapes[now]:
    return values[now]
  end = starts[now + 1] if now + 1 < len(starts) else steps
  passed = min((step - starts[now]) / max(end - starts[now], 1), 1.0)
  part = passed if shapes[now] == 'linear' else (1 - math.cos(math.pi * passed)) / 2
  return values[now - 1] + part * (values[now] - values[now - 1])


class Rate(NamedTuple):
  """The learning rate of a run: a linear rise over `warmup` updates, then a row of SHAPES."""

  peak: float
  warmup: int
  shape: str
  final: float  # fraction of the peak at the end
  decay: float  # 'wsd': the part of what follows the warm-up in which it falls
  phases: str  # 'phases': a schedule of factors over the whole run
  steps: int


def learning_rate(rate: Rate, update: int) -> float:
  """The rate of an update, from 0. The first has 1/warmup of the peak."""
  warmup = min(rate.warmup, rate.steps)
  if update < warmup:
    return rate.peak * (update + 1) / warmup
  if rate.shape == 'phases':
    return rate.peak * schedule_value(rate.phases, rate.steps, update)
  if rate.shape == 'constant':
    return rate.peak
  length, done = rate.steps - warmup, update - warmup
  if rate.shape == 'cosine':
    # Loshchilov & Hutter 2017 (1608.03983) eq. 5, a single period.
    half = (1 + math.cos(math.pi * min(done / max(length, 1), 1.0))) / 2
    return rate.peak * (rate.final + (1 - rate.final) * half)
  if rate.shape == 'wsd':
    # MiniCPM (2404.06395), section 4: stable, then down, here linearly.
    fall = round(rate.decay * length)
    passed = min(max((done - (length - fall)) / max(fall, 1), 0.0), 1.0)
    return rate.peak * (1 - passed * (1 - rate.final))
  return math.nan  # a row without its equation is not certified
