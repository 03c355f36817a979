"""Interference of balance losses with the language model, against gradients taken apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import frozendict
from moejax.train.step.gradient_interference import interference, leaves_at
from tests.support.quick import QUICK
from tests.train.step.step_cases import CONFIG, differentiate, make_batch, replace, start


@pytest.mark.slow
def test_interference_is_of_the_gradients_of_the_objective() -> None:
  """Against the gradient of the step with and without balance losses; one config's schedules switch
  them off."""
  losses = {name: f'{CONFIG.balance.losses[name]}, 0@50%' for name in CONFIG.balance.active()}
  cfg = replace(CONFIG, balance=dataclasses.replace(CONFIG.balance, losses=frozendict(losses)))
  batch, step = make_batch(), differentiate(cfg)
  whole, lm = (step(start(cfg)._replace(step=jnp.int32(n)), batch).grads for n in (0, 10))
  found = jax.jit(functools.partial(interference, cfg=cfg), compiler_options=QUICK)(
    start(cfg), batch
  )
  for place, is_router in (('router', True), ('trunk', False)):
    ours, theirs = (
      np.concatenate([np.ravel(v) for v in leaves_at(g, is_router).values()]) for g in (whole, lm)
    )
    pull = ours - theirs
    np.testing.assert_allclose(
      found[f'{place}_ratio'], np.linalg.norm(pull) / np.linalg.norm(theirs), rtol=1e-4
    )
    np.testing.assert_allclose(
      found[f'{place}_cosine'],
      pull @ theirs / np.linalg.norm(pull) / np.linalg.norm(theirs),
      rtol=2e-3,
      atol=1e-4,
    )
  assert len(leaves_at(whole, True)) == 1
