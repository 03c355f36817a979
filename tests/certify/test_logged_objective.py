"""Line 4 adds up the logged terms with the coefficients that the schedules have at each step."""

import pytest

from moejax.certify import tiny_config
from moejax.certify import tiny_model as tiny
from moejax.certify.logged_objective import step_coefficients
from moejax.config.schedule import piecewise


@pytest.mark.parametrize('noisy', [False, True])
def test_coefficients_are_those_of_the_schedules(noisy: bool) -> None:
  cfg = tiny_config.base_config(noisy)
  texts = {f'balance/{name}': text for name, text in tiny_config.schedules(noisy).items()}
  texts['z_loss'] = cfg.loss.z_coef
  for step, coefficients in step_coefficients(noisy).items():
    for term, text in texts.items():
      wanted = coefficients[term] if term in coefficients else 0.0
      assert float(piecewise(text, cfg.steps)(step)) == pytest.approx(wanted), (step, term)
