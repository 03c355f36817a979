"""How the parameters of an MoE layer start, and what its config refuses."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import Array

from moejax.config import ConfigError
from moejax.moe.layer import MoE, MoEConfig
from tests.moe.layer_cases import FIRST, GPT_OSS, NOISY, D, layer, parameters
from tests.support.quick import QUICK


def test_noise_begins_alike_for_all_experts() -> None:
  make = jax.jit(lambda key: MoE(key, D, NOISY, std=0.5), compiler_options=QUICK)
  made = make(jax.random.key(1))
  assert not made.noise[...].any() and made.noise[...].shape == (D, 4)
  assert 0.3 < np.std(made.router[...]) < 0.7 and not hasattr(layer(FIRST[0]), 'noise')


def test_how_parameters_start_and_where_they_lie() -> None:
  """What writes to the residual has its own standard deviation.

  Biases start at 0, and like all vectors do not decay.
  """
  cfg = dataclasses.replace(GPT_OSS, num_shared=2, shared_gate=True, d_expert=64)
  fewer_switches = MoEConfig(cfg.router, d_expert=64, num_shared=2)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def make(key: Array) -> tuple[MoE, MoE, MoE]:
    return (
      MoE(key, D, cfg, std=0.5, out_std=0.1),
      MoE(key, D, fewer_switches, std=0.5),
      MoE(key, D, cfg, std=0.5),
    )

  made, plain, narrow = make(jax.random.key(1))
  axes = {
    'router': ('embed', ''),
    'router_logit_bias': ('norm',),
    'shared_gate': ('embed', ''),
    **{f'experts.{name}': ('expert', 'embed', 'mlp') for name in ('gate', 'up')},
    'experts.down': ('expert', 'mlp', 'embed'),
    'shared.down': ('mlp', 'embed'),
    **{f'experts.{name}_bias': ('expert', 'norm') for name in ('gate', 'up', 'down')},
    **{f'shared.{name}': ('embed', 'mlp') for name in ('gate', 'up')},
  }
  found, before, wide = parameters(made), parameters(plain), parameters(narrow)
  assert set(found) == set(axes) and set(axes) - set(before) == {
    'shared_gate',
    'experts.gate_bias',
    'experts.up_bias',
    'experts.down_bias',
  }
  for name, value in found.items():
    holder = functools.reduce(getattr, name.split('.'), made)
    assert holder.get_metadata('axes') == axes[name], name
    std = 0.1 if 'down' in name else 0.5
    if 'bias' in name:
      std = 0.0
    np.testing.assert_allclose(
      value.std(), std, rtol=0.1 if value.size > 500 else 0.5, err_msg=name
    )
    np.testing.assert_allclose(
      wide[name], value * (5 if 'down' in name else 1), rtol=1e-6, err_msg=name
    )
    if name in before:
      np.testing.assert_array_equal(
        before[name], wide[name], err_msg='a switch changed how another parameter starts'
      )


@pytest.mark.parametrize(
  ('fields', 'problems'),
  [
    ({'d_expert': 0, 'num_shared': -1}, ['d_expert=0', 'num_shared=-1']),
    (
      {'shared_gate': True, 'd_shared': 8},
      ['d_shared=8 with num_shared=0', 'shared_gate=True with num_shared=0'],
    ),
    ({'num_shared': 1, 'd_shared': -8}, ['d_shared=-8']),
    ({'activation': 'relu'}, ["activation='relu' is not one of ['clamped_swiglu', 'swiglu']"]),
    ({'activation': 'clamped_swiglu', 'activation_limit': 0.0}, ['activation_limit=0.0']),
  ],
)
def test_a_layer_that_cannot_be_is_one_clear_error(
  fields: dict[str, int | str | float], problems: list[str]
) -> None:
  with pytest.raises(ConfigError) as error:
    MoEConfig(**fields)
  assert [problem.split(':')[0] for problem in error.value.problems] == problems
