"""Line 4: coefficients by the oracle, and differences that see what the gradient leaves out."""

import numpy as np
import pytest

from moejax.certify import tiny_config
from moejax.certify.cases import Plan
from moejax.certify.checks import Worst
from moejax.certify.logged_objective import (
  LoggedChecks,
  Slopes,
  alone_steps,
  coefficients_at,
  directions,
)
from moejax.config.schedule import piecewise
from moejax.data.batch import make_batch


@pytest.mark.parametrize('noisy', [False, True])
def test_coefficients_are_those_of_the_schedules(noisy: bool) -> None:
  cfg = tiny_config.rich_config(noisy)
  texts = {f'balance/{name}': text for name, text in tiny_config.schedules(noisy).items()}
  texts |= {'z_loss': cfg.loss.z_coef, 'mtp_loss': cfg.loss.mtp_coef}
  steps = alone_steps(cfg)
  assert max(steps) < tiny_config.STEPS, 'a term has no step of its own'
  for step in steps:
    coefficients = coefficients_at(cfg, step)
    assert coefficients.pop('lm_loss') == 1 and set(coefficients) == set(texts)
    for term, text in texts.items():
      assert float(piecewise(text, cfg.steps)(step)) == pytest.approx(coefficients[term])


def test_every_layer_of_every_leaf_has_a_direction_of_its_own() -> None:
  model = {'blocks/w': np.ones((2, 3)), 'embed': np.ones(4), 'mtp/w': np.zeros((1, 2))}
  found = directions(Plan(quick=True), model, 0)
  assert [one.name for one in found] == ['blocks/w 0', 'blocks/w 1', 'embed', 'mtp/w 0']
  assert not found[0].change[1].any() and found[0].change[0].all()


def test_a_gradient_that_is_partly_zero_is_seen() -> None:
  """Along itself, half a gradient has the slope of the whole."""
  g = np.random.default_rng(0).normal(size=(2, 50))
  along = directions(Plan(quick=True), {'blocks/w': g}, 0)
  slopes = Slopes(make_batch(np.zeros((1, 2))), along, {'lm_loss': np.zeros(2)})
  slopes.of_terms['lm_loss'][:] = [(g * one.change).sum() for one in along]

  def worst_of(gradient: np.ndarray) -> Worst:
    checks = LoggedChecks()
    checks.see_slopes('', {'blocks/w': gradient}, slopes, {'lm_loss': 1.0})
    return checks.slopes

  assert worst_of(g).check().passed
  half = g.copy()
  half[1, :25] = 0
  assert worst_of(half).worst > 1e-2 and worst_of(half).where.startswith('blocks/w 1')
