"""Statistics of the load and of the bias, and the worst of all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.statistics import (
  bias_statistics,
  layer_statistics,
  over_layers,
)
from tests.moe.statistics_cases import loads
from tests.support import oracle

LOAD_ORACLE = {
  'max_vio': oracle.max_vio,
  'expert_usage': oracle.expert_usage,
  'dead_experts': oracle.dead_experts,
  'load_entropy': oracle.load_entropy,
  'balance_score': oracle.balance_score,
}


@pytest.mark.parametrize('kind', ['numpy', 'jit'])
def test_load_statistics_are_the_oracles(kind: str) -> None:
  load = loads()
  compute = jax.jit(layer_statistics, static_argnums=1) if kind == 'jit' else layer_statistics
  found = compute(load if kind == 'numpy' else jnp.asarray(load), 2)
  assert set(found) == {*LOAD_ORACLE, 'noise_floor', 'std_of_share'}
  assert isinstance(found['max_vio'], np.ndarray) == (kind == 'numpy')
  for name, of in LOAD_ORACLE.items():
    np.testing.assert_allclose(
      found[name], [of(c) for c in load], rtol=1e-5, atol=1e-6, err_msg=name
    )
  np.testing.assert_allclose(
    found['noise_floor'], [oracle.noise_floor(c, 2) for c in load], rtol=1e-5
  )
  np.testing.assert_allclose(
    found['std_of_share'], [np.std(c / c.sum()) for c in load], rtol=1e-5, atol=1e-8
  )
  np.testing.assert_allclose(
    found['std_of_share'], (1 - found['balance_score']) / 16, rtol=1e-5, atol=1e-7
  )


def test_balance_and_collapse_have_the_values_that_they_name() -> None:
  even, one = layer_statistics(np.stack([np.full(8, 5.0), np.eye(8)[2] * 40]), 2), 1
  assert {k: float(v[0]) for k, v in even.items() if k != 'noise_floor'} == pytest.approx(
    {
      'max_vio': 0,
      'expert_usage': 1,
      'dead_experts': 0,
      'load_entropy': 1,
      'balance_score': 1,
      'std_of_share': 0,
    }
  )
  assert even['max_vio'][one] == 7
  assert even['expert_usage'][one] == 1 / 8
  assert even['dead_experts'][one] == 7
  assert even['load_entropy'][one] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('experts', [1, 2, 8])
def test_no_copy_and_one_expert_are_finite(experts: int) -> None:
  load = np.stack([np.zeros(experts), np.ones(experts)]).astype(np.float32)
  with np.errstate(all='raise'):
    layers = layer_statistics(load, 1)
    found = over_layers(layers)
  assert all(np.isfinite(v).all() for v in [*layers.values(), *found.values()])
  assert layers['expert_usage'].tolist() == [0, 1]
  assert layers['dead_experts'].tolist() == [experts, 0]
  assert layers['load_entropy'].tolist() == pytest.approx([0, 1])
  assert layers['max_vio'].tolist() == [0, 0]


def test_noise_floor_is_about_what_random_choices_give() -> None:
  rng = np.random.default_rng(0)
  found = []
  for _ in range(50):
    ids = np.argsort(rng.random((1000, 32)), axis=1)[:, :4]
    found.append(oracle.max_vio(np.bincount(ids.reshape(-1), minlength=32)))
  floor = layer_statistics(np.full((1, 32), 125.0), 4)['noise_floor'][0]
  assert 0.7 < np.mean(found) / floor < 1.1


# ---- over layers
def test_over_layers_the_mean_and_the_worst() -> None:
  layers = layer_statistics(loads(), 2)
  found = over_layers(layers)
  assert found['max_vio'] == pytest.approx(np.mean(layers['max_vio']))
  assert found['max_vio_worst'] == 15
  assert found['expert_usage_worst'] == 1 / 16 and found['dead_experts_worst'] == 15
  assert found['balance_score_worst'] == pytest.approx(layers['balance_score'].min())
  assert all(np.ndim(value) == 0 for value in found.values())


def test_bias_statistics_and_the_layer_farthest_from_zero() -> None:
  layers = bias_statistics(np.array([[0.1, 0.3], [-0.5, -0.1], [0.0, 0.0]]))
  assert layers['bias_mean'].tolist() == pytest.approx([0.2, -0.3, 0])
  assert layers['bias_std'].tolist() == pytest.approx([0.1, 0.2, 0])
  assert layers['bias_max'].tolist() == pytest.approx([0.3, 0.5, 0])
  found = over_layers(layers)
  assert found['bias_mean_worst'] == pytest.approx(-0.3)
  assert found['bias_max_worst'] == pytest.approx(0.5)
