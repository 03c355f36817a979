"""Losses of the router itself: its logits' size, and how alike its experts are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
)
from moejax.moe.routing import RouterConfig, route
from tests.moe.balance.loss_cases import cases
from tests.support import oracle
from tests.support.quick import QUICK


def test_simbal_is_the_l1_distance_of_the_experts_from_orthonormal() -> None:
  rng = np.random.default_rng(0)
  case, no_bias = cases(4)['nothing'], jnp.zeros(4)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def measured_of(w: Array) -> tuple[Array, Array]:
    def value(w: Array) -> Array:
      routing = route(case.logits, no_bias, RouterConfig(4, 2))._replace(router=w)
      return BALANCE_LOSSES['simbal'].value(routing, case.mask, case.segments)

    return jax.value_and_grad(value)(w)

  w = rng.normal(size=(6, 4)).astype(np.float32)
  value, gradient = measured_of(w)
  np.testing.assert_allclose(value, oracle_balance.simbal(w.astype(np.float64)), rtol=1e-6)
  np.testing.assert_allclose(
    gradient, oracle.finite_difference(oracle_balance.simbal, w), rtol=1e-5, atol=1e-6
  )
  orthonormal = np.linalg.qr(rng.normal(size=(6, 4)))[0].astype(np.float32)
  assert measured_of(orthonormal)[0] < 1e-5, 'orthonormal experts cost nothing'
  strange = [measured_of(s * orthonormal) for s in (0.0, 1e4)]
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(strange)) and strange[0][0] == 4
