"""The optional row of tokamax: its products are asked for, and where it is absent that is told.

Letters: T tokens, D model, F FFN hidden, E experts.
"""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.experts import grouped_ffn, tokamax_ffn
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.ragged_dot_ffn import ragged_backward, ragged_forward
from moejax.moe.experts.residuals import Residuals
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Weights

T, D, F, E = 9, 4, 6, 3
ACTIVATION = ACTIVATIONS['swiglu'](0.0)


def test_its_three_products_forward_and_six_backward_take_the_place_of_those_of_jax(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  asked = []

  def dot(*arrays: jax.Array) -> jax.Array:
    asked.append('dot')
    return jax.lax.ragged_dot(*arrays)

  def general(*arrays: jax.Array) -> jax.Array:
    asked.append('general')
    return jax.lax.ragged_dot_general(*arrays)

  stand_in = SimpleNamespace(ragged_dot=dot, ragged_dot_general=general)
  monkeypatch.setitem(sys.modules, 'tokamax', stand_in)
  rng = np.random.default_rng(0)
  x, dy = jnp.asarray(rng.normal(size=(2, T, D)), jnp.float32)
  shapes = (E, D, F), (E, D, F), (E, F, D)
  weights = Weights(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
  ids = jnp.asarray(rng.integers(0, E + 1, (T, 2)))
  copies = sort_copies(ids, jnp.asarray(rng.normal(size=ids.shape), jnp.float32), E)
  y, kept = tokamax_ffn.tokamax_forward(x, copies, weights, ACTIVATION)
  assert asked == 3 * ['dot']
  residuals = Residuals(x, copies, weights, kept)
  gradients = tokamax_ffn.tokamax_backward(residuals, ACTIVATION, dy)
  assert sorted(asked) == 6 * ['dot'] + 3 * ['general']
  np.testing.assert_array_equal(y, ragged_forward(x, copies, weights, ACTIVATION)[0])
  jax.tree.map(np.testing.assert_array_equal, gradients, ragged_backward(residuals, ACTIVATION, dy))


def test_where_the_package_is_absent_the_config_says_how_to_get_it(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(grouped_ffn, 'has_tokamax', lambda: False)
  with pytest.raises(ConfigError, match='pip install tokamax'):
    DispatchConfig(implementation='tokamax')
  with pytest.raises(ConfigError, match='blocked'):
    DispatchConfig(implementation='tokamac')
