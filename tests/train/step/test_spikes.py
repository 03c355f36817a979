"""Stability: noise is measured, spikes are found once, and neither a bad step nor a resume changes
the story."""

import functools
import math

import jax
import numpy as np
import pytest

from moejax.train.step.spikes import (
  RATE,
  SIGMAS,
  Stability,
  init_stability,
  spike_limit,
  update_stability,
)

WARM = round(1 / RATE)
NAMES = {
  'stability',
  'loss_trend',
  'loss_spike',
  'loss_spikes',
  'grad_norm_spike',
  'grad_norm_spikes',
}
one = jax.jit(update_stability)


@functools.partial(jax.jit)
def many(
  state: Stability, losses: jax.Array, norms: jax.Array, skipped: jax.Array
) -> tuple[Stability, dict[str, jax.Array]]:
  return jax.lax.scan(lambda s, x: update_stability(s, *x), state, (losses, norms, skipped))


def story(
  losses: list[float],
  norms: list[float] | None = None,
  skipped: list[bool] | None = None,
  state: Stability | None = None,
) -> tuple[Stability, dict[str, np.ndarray]]:
  """Runs of 200 steps, so that there is one program; what is left over is a skipped step."""
  n, size = len(losses), 200
  assert n <= size
  norms = np.ones(n) if norms is None else norms
  skipped = np.zeros(n, bool) if skipped is None else skipped

  def room(a: list) -> np.ndarray:
    return np.asarray([*a, *np.zeros(size - n)], np.float32)

  end, metrics = many(
    init_stability() if state is None else state,
    room(losses),
    room(norms),
    np.asarray([*skipped, *np.ones(size - n, bool)], bool),
  )
  return end, {name: np.asarray(value)[:n] for name, value in metrics.items()}


def by_the_formula(losses: np.ndarray) -> tuple[list[float], list[float], list[int]]:
  """Trend, deviation and spikes of a loss in plain Python."""
  trend, gap, square, trends, stds, spikes = 0.0, 0.0, 0.0, [], [], []
  for n, x in enumerate(map(float, losses)):
    limit = trend + gap + SIGMAS * math.sqrt(max(square - gap**2, 0))
    spikes.append(int(n >= WARM and x > limit))
    d = (min(x, limit + 1e-6 * abs(trend)) if n >= WARM else x) - trend
    if n:
      rate = max(RATE, 1 / n)
      gap, square = gap + rate * (d - gap), square + rate * (d * d - square)
    trend += max(RATE, 1 / (n + 1)) * d
    trends.append(trend)
    stds.append(math.sqrt(max(square - gap**2, 0)))
  return trends, stds, spikes


def falling(n: int = 200, noise: float = 0.05) -> np.ndarray:
  rng = np.random.default_rng(0)
  return (4 + 4 * np.exp(-np.arange(n) / 60) + noise * rng.normal(size=n)).astype(np.float32)


def test_it_is_its_formula() -> None:
  losses = falling()
  losses[[90, 140]] += 1.5
  trends, stds, spikes = by_the_formula(losses)
  _, found = story(losses)
  assert set(found) == NAMES and sum(spikes) >= 2
  np.testing.assert_allclose(found['loss_trend'], trends, rtol=1e-5)
  np.testing.assert_allclose(found['stability'], stds, rtol=2e-3, atol=1e-3)
  assert (found['loss_spike'] == spikes).all() and (found['loss_spikes'] == np.cumsum(spikes)).all()


def test_stability_is_the_noise_and_not_the_fall() -> None:
  rng = np.random.default_rng(1)
  quiet, loud = (4 - 0.01 * np.arange(200) + noise * rng.normal(size=200) for noise in (0.03, 0.5))
  # A stable run has below 0.1.
  assert 0.015 < story(quiet)[1]['stability'][-1] < 0.06
  assert 0.3 < story(loud)[1]['stability'][-1] < 0.8


def test_a_spike_is_counted_once_and_hides_no_later_one() -> None:
  rng = np.random.default_rng(2)
  norms = 1 + 0.1 * rng.normal(size=200)
  norms[[60, 65]] = [1e9, 3.0]
  losses = 3 + 0.01 * rng.normal(size=200)
  losses[100] += 2
  _, found = story(losses, norms)
  assert np.flatnonzero(found['grad_norm_spike']).tolist() == [60, 65]
  assert found['grad_norm_spikes'][-1] == 2
  assert np.flatnonzero(found['loss_spike']).tolist() == [100] and found['loss_spikes'][-1] == 1


def test_no_spike_before_there_is_a_trend_and_a_new_level_becomes_one() -> None:
  _, early = story([8, 20, 3, 9, 50, *[5] * 10])
  assert not early['loss_spikes'].any()
  _, shifted = story([2.0] * 30 + [3.0] * 170)  # no noise at all: a deviation of 0
  assert shifted['loss_spike'][30] == 1 and shifted['loss_trend'][-1] == pytest.approx(3, abs=0.05)
  assert not shifted['loss_spike'][-20:].any()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_skipped_step_changes_nothing(bad: float) -> None:
  losses, norms = falling(60), 1 + 0.1 * np.random.default_rng(3).normal(size=60)
  want, clean = story(losses, norms)
  where = [0, 5, 30, 60]
  dirty_losses = np.insert(losses, where, [bad, 3.0, bad, bad])
  dirty_norms = np.insert(norms, where, [1.0, bad, bad, 1.0])
  # The last is not finite, and not told so.
  skipped = np.insert(np.zeros(60, bool), where, [True, True, True, False])
  end, found = story(dirty_losses, dirty_norms, skipped)
  jax.tree.map(np.testing.assert_array_equal, end, want)
  good = np.delete(np.arange(64), [0, 6, 32, 63])
  for name in NAMES:
    np.testing.assert_array_equal(found[name][good], clean[name], err_msg=name)
    assert np.isfinite(found[name]).all(), name
  # Finite, and skipped all the same.
  step, metrics = one(want, np.float32(99.0), np.float32(99.0), np.True_)
  jax.tree.map(np.testing.assert_array_equal, step, want)
  assert metrics['loss_spike'] == 0


def test_numbers_whose_squares_are_not_finite() -> None:
  end, found = story([3e38, -3e38, *[1.0] * 60, 3e38, *[1.0] * 60], [3e38] * 123)
  assert all(np.isfinite(leaf).all() for leaf in end)
  assert all(np.isfinite(value).all() for value in found.values())


def test_going_on_is_the_same_as_not_stopping() -> None:
  losses = falling(160)
  whole, told = story(losses)
  half, first = story(losses[:70])
  kept = Stability(*(np.array(leaf) for leaf in half))  # as a checkpoint would
  end, second = story(losses[70:], state=kept)
  jax.tree.map(np.testing.assert_array_equal, end, whole)
  for name in NAMES:
    np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), told[name])


def test_noise_alone_seldom_makes_a_spike() -> None:
  rng = np.random.default_rng(4)
  spikes = [
    story(3 + rng.normal(size=200), 1 + rng.normal(size=200))[0].spikes.sum() for _ in range(30)
  ]
  assert sum(spikes) <= 10  # of 30 * 2 * 180 chances: 2 or 3 are to be expected


@pytest.mark.parametrize('jump', [10, 60, 500])
def test_the_limit_rises_until_a_level_that_stays_is_none(jump: float) -> None:
  """As with optim.skip_spikes, where such steps are left out: within ten, unless the level is far
  beyond all before."""
  rng = np.random.default_rng(5)
  noise = rng.normal(size=100)
  state, _ = story(3 + 0.1 * noise)
  over = 0
  while over < 100 and 3 + 0.1 * jump > spike_limit(state, 6.0)[0]:
    state, _ = one(state, np.float32(3 + 0.1 * jump), np.float32(1), np.False_)
    over += 1
  assert {10: 1, 60: 5, 500: 12}[jump] <= over <= {10: 4, 60: 10, 500: 20}[jump], over
