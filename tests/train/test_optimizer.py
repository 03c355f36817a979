"""AdamW against the oracle over a warm-up, decay and clipping; schedules of the rate."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.sharding.params import constant_init, normal_init, param
from moejax.train.optimizer import (
  SCHEDULES,
  OptimConfig,
  decay_mask,
  learning_rate,
  optimizer,
  updates_made,
)
from tests.support import oracle

STEPS = 6
CFG = OptimConfig(
  learning_rate=0.1, warmup_steps=2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=2.0
)
RNG = np.random.default_rng(0)


class Layer(nnx.Module):
  """A matrix and the scale of a norm."""

  def __init__(self, key: jax.Array) -> None:
    self.w = param(key, (3, 4), ('embed', 'mlp'), normal_init(1.0))
    self.scale = param(key, (4,), ('norm',), constant_init(1.0))


class Model(nnx.Module):
  """The same alone and stacked over three layers, as a transformer has them."""

  def __init__(self, key: jax.Array) -> None:
    self.one = Layer(key)
    self.blocks = jax.vmap(Layer)(jax.random.split(key, 3))


DECAY = {'blocks.scale': False, 'blocks.w': True, 'one.scale': False, 'one.w': True}


def flat(tree: object) -> dict[str, np.ndarray]:
  """Leaves by their path."""

  def name(path: tuple) -> str:
    return '.'.join(re.findall(r'\w+', jax.tree_util.keystr(path))).removesuffix('.value')

  return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope='module')
def model() -> Model:
  return jax.jit(Model)(jax.random.key(0))


def test_the_decay_mask_leaves_norms_out_also_when_stacked(model: Model) -> None:
  mask = decay_mask(model)
  assert flat(model).keys() == DECAY.keys()
  assert [bool(leaf) for leaf in jax.tree.leaves(mask)] == [DECAY[name] for name in flat(model)]


@pytest.mark.parametrize('clip', [0.0, CFG.clip_norm])
def test_six_steps_are_the_oracles(model: Model, clip: float) -> None:
  """Gradients from far below the clipping norm to far above it."""
  cfg = dataclasses.replace(CFG, clip_norm=clip)
  grads = [
    jax.tree.map(
      lambda a, scale=10.0 ** (i - 3): np.float32(scale * RNG.normal(size=a.shape)), model
    )
    for i in range(STEPS)
  ]
  norms = [oracle.global_norm(flat(g)) for g in grads]
  assert min(norms) < CFG.clip_norm / 10 and max(norms) > 10 * CFG.clip_norm
  tx = optimizer(cfg, STEPS)

  @jax.jit
  def step(model: Model, state: optax.OptState, g: Model) -> tuple[Model, optax.OptState]:
    updates, state = tx.update(g, state, model, grad_norm=optax.tree.norm(g))
    return optax.apply_updates(model, updates), state

  after, state = model, jax.jit(tx.init)(model)
  for i, g in enumerate(grads):
    assert int(updates_made(state)) == i
    after, state = step(after, state, g)
  rates = [float(learning_rate(cfg, STEPS)(i)) for i in range(STEPS)]
  rule = oracle.AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, decay=DECAY, clip=clip)
  want = oracle.adamw(flat(model), [flat(g) for g in grads], rates=rates, rule=rule)
  for name, leaf in flat(after).items():
    np.testing.assert_allclose(leaf, want[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.abs(leaf - flat(model)[name]).max() > 0.05


def rates(steps: int = 100, **changes: float | str) -> list[float]:
  cfg = OptimConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
  if changes.get('schedule') == 'phases':
    changes = {'phases': '1, 0.5@50%'} | changes
  schedule = learning_rate(dataclasses.replace(cfg, **changes), steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps + 1))).tolist()


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_warm_up_rises_from_one_part_to_the_full_rate(schedule: str) -> None:
  """Update 0 is one of the updates: with the rate 0 it would be wasted."""
  found = rates(schedule=schedule)
  np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert found[10] == 1 and max(found) == 1
  assert rates(schedule=schedule, warmup_steps=0)[0] == 1
  np.testing.assert_allclose(rates(schedule=schedule, warmup_steps=1)[:2], 1)


def test_cosine_ends_at_the_final_fraction() -> None:
  found = rates(schedule='cosine')
  want = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(91)]
  np.testing.assert_allclose(found[10:], want, rtol=1e-5)
  np.testing.assert_allclose(found[-1], 0.1, rtol=1e-5)
  assert rates(schedule='cosine', final_fraction=0.0)[-1] < 1e-6


def test_wsd_stays_then_falls_in_a_line() -> None:
  found = rates(schedule='wsd')
  np.testing.assert_allclose(found[10:83], 1)  # 0.2 of the 90 after the warm-up: 18
  np.testing.assert_allclose(found[82:], np.linspace(1, 0.1, 19), rtol=1e-5)
  falling = rates(schedule='wsd', decay_fraction=1.0)
  np.testing.assert_allclose(falling[10:], np.linspace(1, 0.1, 91), rtol=1e-5)
  np.testing.assert_allclose(rates(schedule='wsd', decay_fraction=0.0)[10:100], 1)


def test_phases_are_parts_of_the_whole_run() -> None:
  """Of its 100 steps, and not of the 90 after the warm-up."""
  found = rates(schedule='phases', phases='1, cosine 0.1@40%, 0.1@80%, 0.03@90%')
  np.testing.assert_allclose(found[10:40], 1)
  np.testing.assert_allclose(
    found[40:80], [0.1 + 0.9 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)], rtol=1e-5
  )
  np.testing.assert_allclose(found[80:], [0.1] * 10 + [0.03] * 11, rtol=1e-6)
  np.testing.assert_allclose(
    rates(schedule='phases', phases='1, cosine 0.1@0%', warmup_steps=0),
    rates(schedule='cosine', warmup_steps=0),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    rates(schedule='phases', phases='1, linear 0.1@80%', warmup_steps=0),
    rates(schedule='wsd', warmup_steps=0),
    rtol=1e-5,
  )


def test_phases_belong_to_their_schedule() -> None:
  with pytest.raises(ConfigError, match="phases='1' is read by schedule='phases' only"):
    OptimConfig(phases='1')
  with pytest.raises(ConfigError, match="phases='' is not a schedule"):
    OptimConfig(schedule='phases')


def test_a_run_shorter_than_its_warm_up_still_rises() -> None:
  np.testing.assert_allclose(rates(4, warmup_steps=10)[:4], [0.25, 0.5, 0.75, 1])


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    OptimConfig(
      learning_rate=0.0,
      warmup_steps=-1,
      schedule='linear',
      final_fraction=1.5,
      decay_fraction=-0.1,
      beta1=1.0,
      beta2=-0.1,
      eps=0.0,
      weight_decay=-1.0,
      clip_norm=-1.0,
    )
  assert [problem.split(':')[0] for problem in error.value.problems] == [
    'learning_rate=0.0',
    "schedule='linear' is not one of ['constant', 'cosine', 'phases', 'wsd']",
    'warmup_steps=-1',
    'weight_decay=-1.0',
    'clip_norm=-1.0',
    'final_fraction=1.5',
    'decay_fraction=-0.1',
    'beta1=1.0',
    'beta2=-0.1',
    'eps=0.0',
  ]
