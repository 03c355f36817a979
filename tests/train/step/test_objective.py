"""The combined loss: tasks, schedules, multi-token prediction; what padding and packing leave as
it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.certify.tiny_batches import widened_batch
from moejax.config import ConfigError, frozendict
from moejax.data.batch import IGNORE, Batch
from moejax.data.sources import DataConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.transformer import Output
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.bias import BiasState
from moejax.moe.layer import MoEAux
from moejax.moe.routing import RouterConfig
from moejax.moe.statistics import Stats
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.objective import (
  MicroBatch,
  add_terms,
  coefficients,
  forward,
  lm_terms,
  part_scales,
  targets_ahead,
  token_weights,
)
from moejax.train.step.train_step import statistics, task_losses, task_tokens
from tests.support import oracle
from tests.train.step.step_cases import (
  CONFIG,
  LENGTH,
  ROWS,
  VOCAB,
  assert_same,
  differentiate,
  features,
  flat,
  make_batch,
  replace,
  result,
  start,
)

TASKS = DataConfig(source='mixture', mixture=frozendict(code='0.7 stdlib', prose='0.3 synthetic'))
D, DEPTHS = 4, 2
KEYS = jax.random.split(jax.random.key(0), DEPTHS + 2)
HEAD = jax.random.normal(KEYS[0], (D, VOCAB))
HIDDEN = [jax.random.normal(k, (ROWS, LENGTH, D)) for k in KEYS[1:]]


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
  """Weighted mean over tokens of the nll and of logsumexp^2, of a target `depth` tokens on in the
  same document."""
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


class KnownLayers:
  """In the place of a model: layers that have dropped so much, and a loss named as a count."""

  def __init__(self, dropped: float, copies: float) -> None:
    self.stats = Stats(*(jnp.full(1, copies) for _ in Stats._fields))
    self.dropped = jnp.full(1, dropped)

  def __call__(self, batch: Batch, *rest: object, **named: object) -> Output:
    load = jnp.ones((1, 4))
    aux = MoEAux(
      load=load,
      seen=load,
      whole={},
      losses={'load': jnp.full(1, 7.0)},
      dropped=self.dropped,
      stats=self.stats,
      expert_ids=jnp.zeros((1, 2, LENGTH, 2), jnp.int32),
    )
    return Output(HIDDEN[0][:2], aux, None)

  def head_weights(self) -> jax.Array:
    return HEAD


def test_dropped_is_the_fraction_of_all_copies_whatever_losses_are_called() -> None:
  """Micro-batches of 10 and 30 copies; a loss that is named 'load' weighs nothing but itself."""
  moe = dataclasses.replace(CONFIG.model.moe, router=RouterConfig(4, 2, noisy=True))
  balance = BalanceConfig(frozendict(load=0.1))
  cfg = replace(CONFIG, moe=moe, batch_size=4, micro_batches=2, balance=balance)
  batch = jax.tree.map(lambda a: a[:4].reshape(2, 2, *a.shape[1:]), make_batch())
  scales = part_scales(batch, 0, cfg)
  coefs, parts = coefficients(cfg, jnp.int32(0)), []
  for i, model in enumerate((KnownLayers(0.5, 10.0), KnownLayers(0.1, 30.0))):
    own, scale = jax.tree.map(lambda a, i=i: a[i], (batch, scales))
    part = MicroBatch(own, scale, whole={}, rows=jnp.arange(2))
    parts.append(forward(model, jnp.zeros((1, 4)), part, None, coefs, cfg).sums)
  sums, state = add_terms(*parts), BiasState(*jnp.zeros((2, 1, 4)))
  assert float(sums.terms['balance/load']) == pytest.approx(7)
  assert float(statistics(sums, state, cfg)['dropped'][0]) == pytest.approx((5 + 3) / 40)


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


@pytest.mark.slow
def test_padding_columns_change_nothing() -> None:
  grads, sums, *_ = differentiate(CONFIG)(start(CONFIG), widened_batch(make_batch()))
  assert_same(result(CONFIG), (flat(grads), jax.device_get(sums)))


@features
def test_packing_documents_changes_nothing(cfg: ExperimentConfig) -> None:
  """A row of two documents, and the same two in rows of their own: one mean over documents, one
  over tokens."""
  cfg = replace(
    cfg, batch_size=2, balance=dataclasses.replace(CONFIG.balance, losses=frozendict(sequence=0.1))
  )
  tokens = np.arange(1, 13)
  first, second = 5, 7

  def row(*documents: np.ndarray) -> list[np.ndarray]:
    pad = LENGTH - sum(map(len, documents))
    columns = (
      np.concatenate([*documents, np.full(pad, 3)]),
      np.concatenate([*(np.roll(d, -1) for d in documents), np.full(pad, IGNORE)]),
      np.concatenate([*(np.full(len(d), i + 1) for i, d in enumerate(documents)), np.zeros(pad)]),
      np.concatenate([*(np.arange(len(d)) for d in documents), np.zeros(pad)]),
    )
    return [c.astype(np.int32) for c in columns]

  def batch(*rows: list[np.ndarray]) -> Batch:
    tokens, targets, segments, positions = (jnp.stack(column) for column in zip(*rows))
    return Batch(
      tokens, targets, targets != IGNORE, segments, positions, jnp.zeros(len(rows), jnp.int32)
    )

  state = start(cfg)
  packed = batch(row(tokens[:first], tokens[first:]), row())
  apart = batch(row(tokens[:first]), row(tokens[first : first + second]))
  results = [differentiate(cfg)(state, b) for b in (packed, apart)]
  assert_same(*((flat(r.grads), jax.device_get(r.sums)) for r in results))


def test_the_loss_logged_is_the_loss_differentiated() -> None:
  _, sums = result(CONFIG)
  losses = CONFIG.balance.losses
  total = sums.terms['lm_loss'] + sum(
    float(losses[name]) * sums.terms[f'balance/{name}'] for name in CONFIG.balance.active()
  )
  np.testing.assert_allclose(sums.loss, total, rtol=1e-6)
