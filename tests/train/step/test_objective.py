"""The combined loss: tasks, schedules, multi-token prediction; sets that span micro-batches; interference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError, frozendict
from moejax.data.batch import IGNORE, Batch
from moejax.data.sources import DataConfig
from moejax.model.cross_entropy import LossConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.gradient_accumulation import f_gap, gradients
from moejax.train.step.gradient_interference import interference, leaves_at
from moejax.train.step.objective import coefficients, lm_terms, targets_ahead, token_weights
from moejax.train.step.train_step import task_losses, task_tokens, train_step
from tests.support import oracle
from tests.train.step.test_train_step import (
  CONFIG,
  LENGTH,
  QUICK,
  ROWS,
  VOCAB,
  differentiate,
  flat,
  make_batch,
  replace,
  start,
)

TASKS = DataConfig(source='mixture', mixture=frozendict(code='0.7 stdlib', prose='0.3 synthetic'))
D, DEPTHS = 4, 2
KEYS = jax.random.split(jax.random.key(0), DEPTHS + 2)
HEAD, HIDDEN = (
  jax.random.normal(KEYS[0], (D, VOCAB)),
  [jax.random.normal(k, (ROWS, LENGTH, D)) for k in KEYS[1:]],
)


def tasked(**weights: float) -> ExperimentConfig:
  loss = LossConfig(task_weights=frozendict(weights), z_coef='0.1, 0.2@50%', mtp_coef='0.3')
  return replace(CONFIG, data=TASKS, loss=loss)


def two_tasks() -> Batch:
  return make_batch()._replace(task_ids=jnp.array([0, 1, 0, 1, 1, 0, 0, 1]))


def terms_of(
  cfg: ExperimentConfig, batch: Batch, depths: int = 0, step: int = 0
) -> tuple[float, dict, np.ndarray]:
  scale = jnp.stack(
    [1 / token_weights(targets_ahead(batch, d), cfg).sum() for d in range(depths + 1)]
  )
  total, terms, nll = lm_terms(
    tuple(HIDDEN[: depths + 1]), HEAD, batch, scale, coefficients(cfg, jnp.int32(step)), cfg
  )
  return float(total), {name: float(value) for name, value in terms.items()}, np.asarray(nll)


def by_hand(depth: int, batch: Batch, weights: tuple[float, float]) -> tuple[float, float]:
  """Weighted mean over tokens of the nll and of logsumexp^2, of a target `depth` tokens on in the same document."""
  logits = np.asarray(HIDDEN[depth], np.float64) @ np.asarray(HEAD, np.float64)
  targets, segments, tasks = (
    np.asarray(a) for a in (batch.targets, batch.segment_ids, batch.task_ids)
  )
  nll = z = total = 0.0
  for b, s in np.ndindex(ROWS, LENGTH):
    t = s + depth
    if t < LENGTH and segments[b, s] == segments[b, t] and targets[b, t] != IGNORE:
      log_z, w = oracle.logsumexp(logits[b, s]), weights[tasks[b]]
      nll, z, total = nll + w * (log_z - logits[b, s, targets[b, t]]), z + w * log_z**2, total + w
  return nll / total, z / total


@pytest.mark.parametrize('weights', [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_tasks_are_weighed_by_their_tokens(weights: tuple[float, float]) -> None:
  cfg, batch = tasked(code=weights[0], prose=weights[1]), two_tasks()
  for step, z_coef in ((0, 0.1), (10, 0.2)):
    total, terms, nll = terms_of(cfg, batch, step=step)
    want, want_z = by_hand(0, batch, weights)
    np.testing.assert_allclose((terms['lm_loss'], terms['z_loss']), (want, want_z), rtol=1e-5)
    np.testing.assert_allclose(total, want + z_coef * want_z, rtol=1e-5)
  of_tasks = task_losses(jnp.array(nll), task_tokens(batch, cfg), cfg)
  for name, alone in (('code', (1, 0)), ('prose', (0, 1))):
    np.testing.assert_allclose(of_tasks[f'lm_loss/{name}'], by_hand(0, batch, alone)[0], rtol=1e-5)
  np.testing.assert_allclose(of_tasks['nll'], by_hand(0, batch, (1, 1))[0], rtol=1e-5)


def test_a_task_that_a_batch_has_none_of_is_not_zero_but_unknown() -> None:
  cfg, batch = tasked(), two_tasks()._replace(task_ids=jnp.zeros(ROWS, jnp.int32))
  losses = task_losses(jnp.array(terms_of(cfg, batch)[2]), task_tokens(batch, cfg), cfg)
  assert np.isnan(losses['lm_loss/prose']) and np.isfinite(losses['lm_loss/code'])


def test_a_plain_source_has_one_task_and_no_loss_of_it() -> None:
  assert set(task_losses(jnp.ones(1), jnp.ones(1), CONFIG)) == {'nll'}


def test_multi_token_prediction_is_the_mean_over_depths_within_documents() -> None:
  cfg, batch = tasked(code=2.0, prose=0.5), two_tasks()
  total, terms, _ = terms_of(cfg, batch, depths=DEPTHS)
  main, *depths = (by_hand(d, batch, (2.0, 0.5)) for d in range(DEPTHS + 1))
  np.testing.assert_allclose(terms['lm_loss'], main[0], rtol=1e-5)
  np.testing.assert_allclose(terms['mtp_loss'], np.mean([nll for nll, _ in depths]), rtol=1e-5)
  np.testing.assert_allclose(
    terms['z_loss'], main[1] + 0.3 * np.mean([z for _, z in depths]), rtol=1e-5
  )
  np.testing.assert_allclose(
    total, terms['lm_loss'] + 0.3 * terms['mtp_loss'] + 0.1 * terms['z_loss'], rtol=1e-6
  )


def test_targets_further_ahead_stay_in_their_document() -> None:
  rows = jnp.array([[1, 1, 1, 2, 2, 0]])
  batch = Batch(
    rows, jnp.array([[11, 12, 13, 14, 15, IGNORE]]), rows > 0, rows, rows, jnp.zeros(1, jnp.int32)
  )
  np.testing.assert_array_equal(
    targets_ahead(batch, 1).targets, [[12, 13, IGNORE, 15, IGNORE, IGNORE]]
  )
  np.testing.assert_array_equal(
    targets_ahead(batch, 1).mask, [[True, True, False, True, False, False]]
  )
  assert targets_ahead(batch, 0) is batch


def test_weights_of_unknown_tasks_and_bad_numbers_are_refused() -> None:
  with pytest.raises(
    ConfigError, match=r"task_weights.poems is not a task of data: use one of \['code', 'prose'\]"
  ):
    tasked(poems=1.0)
  with pytest.raises(ConfigError, match='task_weights.code=-1'):
    tasked(code=-1)
  with pytest.raises(ConfigError, match="z_coef='x' is not a schedule"):
    LossConfig(z_coef='x')


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
  """The micro-batches of four, the last first; the rows of each expert-parallel group of two stay together."""
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
  assert state.lagged['global_batch'].shape == (1, 2, 4) and state.lagged['ep_group'].shape == (
    2,
    2,
    4,
  )
  np.testing.assert_array_equal(state.lagged['ep_group'].sum(0), state.lagged['global_batch'][0])
  _, metrics = run(state, make_batch())
  assert abs(float(metrics['balance/global_batch']) - 1) > 1e-3


@pytest.mark.slow
def test_interference_is_of_the_gradients_of_the_objective() -> None:
  """Against the gradient of the step with and without balance losses; one config's schedules switch them off."""
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
