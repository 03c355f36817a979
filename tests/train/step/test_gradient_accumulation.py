"""Micro-batches: what they add up to does not depend on the cut, and how they lie on a mesh."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.certify.tiny_batches import widened_batch
from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.plan.hlo.collectives import collectives
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.gradient_accumulation import f_gap, gradients
from moejax.train.step.train_step import train_step
from tests.support.quick import QUICK
from tests.train.step.step_cases import (
  CONFIG,
  FEATURES,
  assert_same,
  differentiate,
  flat,
  make_batch,
  replace,
  result,
  start,
)


@pytest.mark.slow
def test_micro_batches_change_nothing() -> None:
  assert_same(result(CONFIG), result(replace(CONFIG, micro_batches=4)))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['latent', 'windowed'])
def test_micro_batches_recomputation_and_padding_change_nothing_together(name: str) -> None:
  """Of what other families are made of. One program: each alone is tried with the plain model."""
  cfg = FEATURES[name]
  changed = replace(cfg, micro_batches=4, remat='full')
  grads, sums, *_ = differentiate(changed)(start(changed), widened_batch(make_batch()))
  assert_same(result(cfg), (flat(grads), jax.device_get(sums)))


@pytest.mark.slow
def test_micro_batch_loss_is_the_one_that_depends_on_the_cut_by_definition() -> None:
  balance = dataclasses.replace(CONFIG.balance, losses=frozendict(micro_batch=1.0))
  one, two = (
    result(replace(CONFIG, micro_batches=n, balance=balance))[1].terms['balance/micro_batch']
    for n in (1, 2)
  )
  assert abs(one - two) > 1e-3
  halves = dataclasses.replace(balance, losses=frozendict(ep_group=1.0), ep_groups=2)
  np.testing.assert_allclose(
    two, result(replace(CONFIG, balance=halves))[1].terms['balance/ep_group'], rtol=1e-6
  )


@pytest.mark.slow
def test_each_balance_gradient_survives_accumulation() -> None:
  """Where it fails the router's balance gradient falls with the number of tokens, and the log looks
  right.

  One after the other holds the whole coefficient, by schedules: one program for all, and for 1 and
  4 micro-batches. The router is a noisy one: what is random does not depend on the cut either.
  """
  names = sorted(set(BALANCE_LOSSES) - {'micro_batch', 'gshard'})  # of a micro-batch by definition
  part = 100 // len(names)
  schedules = {name: f'0, 100@{i * part}%, 0@{(i + 1) * part}%' for i, name in enumerate(names)}
  balance = dataclasses.replace(
    CONFIG.balance, losses=frozendict(schedules), bias_rule='', ep_groups=2
  )
  router = dataclasses.replace(
    CONFIG.model.moe.router, score_fn='sigmoid', noisy=True, jitter=0.1, expert_dropout=0.25
  )
  moe = dataclasses.replace(CONFIG.model.moe, router=router)
  cfg = replace(CONFIG, balance=balance, steps=100, moe=moe)
  gradients_of = []
  for i, name in enumerate(names):
    one, four = (result(replace(cfg, micro_batches=n), step=i * part) for n in (1, 4))
    # Of `load`, whose gradient goes through the density of the noise, six batches were off by
    # 5e-7 to 1.3e-6; of the others by 8e-7 at most.
    assert_same(one, four, tolerance=3e-6)
    np.testing.assert_allclose(
      one[1].loss - one[1].terms['lm_loss'], 100 * one[1].terms[f'balance/{name}'], rtol=1e-5
    )
    gradients_of.append(one[0])
  assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(gradients_of, 2)), (
    'the same loss twice'
  )


def test_the_gap_of_f_is_0_for_the_truth_and_2_minus_2_over_e_for_all_to_one() -> None:
  even, one = jnp.full((1, 1, 4), 3.0), jnp.eye(4)[:1][None]
  assert f_gap(5 * even, even) == 0
  np.testing.assert_allclose(f_gap(one, even), 2 - 2 / 4)


def accumulating(mode: str) -> ExperimentConfig:
  balance = dataclasses.replace(
    CONFIG.balance,
    losses=frozendict(global_batch='1', ep_group='1'),
    ep_groups=2,
    accumulation=mode,
  )
  return replace(CONFIG, micro_batches=4, balance=balance)


def reordered(batch: Batch) -> Batch:
  """The four micro-batches in another order; the rows of each expert-parallel group of two stay
  together."""
  return jax.tree.map(
    lambda a: a.reshape(4, -1, *a.shape[1:])[jnp.array([1, 0, 3, 2])].reshape(a.shape), batch
  )


@pytest.mark.slow
def test_exact_and_lagged_do_not_know_the_order_of_micro_batches_and_buffer_does() -> None:
  found = {}
  for mode in ('exact', 'lagged', 'buffer'):
    cfg = accumulating(mode)
    step = jax.jit(functools.partial(gradients, cfg=cfg), compiler_options=QUICK)
    state = start(cfg)
    if mode == 'lagged':  # the counts of some other step
      state = state._replace(
        lagged={
          name: a + 1.0 + jnp.arange(a.size).reshape(a.shape) % 5
          for name, a in state.lagged.items()
        }
      )
    found[mode] = [step(state, batch) for batch in (make_batch(), reordered(make_batch()))]
  largest = np.abs(flat(found['exact'][0].grads)).max()
  apart = {
    mode: np.abs(flat(a.grads) - flat(b.grads)).max() / largest for mode, (a, b) in found.items()
  }
  assert apart['exact'] < 1e-6 and apart['lagged'] < 1e-6 and apart['buffer'] > 1e-4, apart
  for name in ('global_batch', 'ep_group'):
    gaps = {mode: float(results[0].gaps[name]) for mode, results in found.items()}
    assert gaps['exact'] == 0 and 0.01 < gaps['buffer'] and 0.01 < gaps['lagged'], gaps
    np.testing.assert_array_equal(found['lagged'][0].seen[name], found['exact'][0].seen[name])


@pytest.mark.slow
def test_lagged_uses_the_counts_of_the_step_before_and_starts_without_any() -> None:
  cfg = accumulating('lagged')
  run = jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK)
  state, metrics = run(start(cfg), make_batch())
  for name in ('global_batch', 'ep_group'):  # f = 1 for all: P sums to 1, and nothing pulls
    np.testing.assert_allclose(metrics[f'balance/{name}'], 1, rtol=1e-5)
  assert state.lagged['global_batch'].shape == (1, 2, 4)
  assert state.lagged['ep_group'].shape == (2, 2, 4)
  np.testing.assert_array_equal(state.lagged['ep_group'].sum(0), state.lagged['global_batch'][0])
  _, metrics = run(state, make_batch())
  assert abs(float(metrics['balance/global_batch']) - 1) > 1e-3


@pytest.mark.slow
def test_micro_batches_are_spread_before_they_are_embedded() -> None:
  """A device holds rows of one micro-batch in four. As activations they would be sent around in
  every layer."""
  parts = 4
  model = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=1,
    attention=AttentionConfig(d_head=8),
    moe=MoEConfig(d_expert=16, dispatch=DispatchConfig('dense_matmul')),
  )
  cfg = ExperimentConfig(
    batch_size=8 * parts,
    seq_len=16,
    micro_batches=parts,
    model=model,
    mesh=MeshConfig(data=1, fsdp=2, expert=4),
  )
  mesh = make_run_mesh(cfg)
  with jax.set_mesh(mesh):
    state, batch = sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh)
    program = (
      jax.jit(lambda state, batch: gradients(state, batch, cfg)).lower(state, batch).compile(QUICK)
    )
    found = collectives(program.as_text(), mesh.shape)
  everywhere = {c.kind: c.count for c in found if c.axes == ('fsdp', 'expert')}
  # The CPU's compiler, and no chip's, gathers scores for top-k: twice a layer.
  assert everywhere['all-gather'] <= 2 * parts and everywhere['collective-permute'] <= 2 * len(
    batch
  )
