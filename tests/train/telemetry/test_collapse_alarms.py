"""Routing that collapses: gradients stay finite, one alarm is given, with its remedy, and sound
runs give none."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.certify.tiny_model import batch
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.train.telemetry.collapse_alarms import (
  ALARM_KINDS,
  FEW,
  STEPS_UNTIL_ALARM,
  Alarms,
  count_alarms,
)
from moejax.train.trainer import train
from tests.support.tiny_run import config, rows
from tests.train.step import step_cases

NONE = np.zeros(2)
EVEN = np.full((2, 4), 1000.0)
# Of 2000 tokens, two experts each.
CROWDED = np.array([[1000, 1000, 1000, 1000], [2000, 700, 700, 600]], float)
IDLE = np.array([[1300, 1300, 1400, 0], [1000, 1000, 1000, 1000]], float)


def story(*parts: tuple[int, np.ndarray, np.ndarray], every: int = 10) -> list[str]:
  """Lines after rows of (number, load, dropped)."""
  alarms, lines, step = Alarms(2), [], 0
  for number, load, dropped in parts:
    for _ in range(number):
      step += every
      lines += alarms.update(step, load, dropped)
  return lines


def test_an_alarm_is_given_once_when_it_has_lasted() -> None:
  assert story((50, EVEN, NONE)) == []
  for load, dropped, what in (
    (CROWDED, NONE, r'one expert gets nearly every token: layer 1 \(100%\)\.'),
    (IDLE, NONE, r'experts get no token: layer 0 \(1 of 4\)\.'),
    (EVEN, np.array([0.5, 0.98]), r'nearly all copies .* dropped: layer 1 \(98%\)\.'),
  ):
    lines = story((30, load, dropped))
    assert len(lines) == 1 and re.search(what, lines[0]), lines
    assert f'after step {STEPS_UNTIL_ALARM + 10}, ' in lines[0]
    assert 'Remedy: raise ' in lines[0]
    again = story((30, load, dropped), (1, EVEN, NONE), (30, load, dropped))
    assert len(again) == 2 and 'after step 420, ' in again[1], again
    # Not long enough, twice.
    assert story((10, load, dropped), (1, EVEN, NONE), (10, load, dropped)) == []
    assert count_alarms(load, dropped, 2) == 1
  assert count_alarms(EVEN, NONE, 2) == 0 and count_alarms(CROWDED, np.ones(2), 2) == 3


def test_a_little_better_is_not_over_and_not_told_again() -> None:
  assert len(story((12, EVEN, 0.95 + NONE), (3, EVEN, 0.8 + NONE), (30, EVEN, 0.95 + NONE))) == 1
  assert story((40, EVEN, 0.8 + NONE)) == []


def test_layers_that_collapse_together_are_one_line() -> None:
  lines = story((20, np.array([[2000, 2000, 0, 0]] * 3, float), np.zeros(3)))
  assert len(lines) == 2 and lines[0].count('layer ') == 3


def test_what_is_chance_or_cannot_be_otherwise_is_none() -> None:
  few = np.array([[FEW, FEW, FEW, 0]], float)
  assert story((30, few, np.zeros(1))) == [] and story((30, few + [0, 0, FEW, 0], np.zeros(1)))
  assert story((30, np.array([[500.0, 500.0]]), np.zeros(1))) == []  # each token takes both
  assert story((30, np.zeros((1, 4)), np.full(1, np.nan))) == []  # a step without a token


@pytest.mark.slow
@pytest.mark.parametrize(
  'dispatch',
  [
    DispatchConfig('sparse_matmul'),
    DispatchConfig('dense_matmul'),
    DispatchConfig('dense_matmul', capacity_factor=1e-9),
  ],
  ids=str,
)
def test_gradients_stay_finite(dispatch: DispatchConfig) -> None:
  """All tokens to one expert, experts without any, and a buffer of one row an expert."""
  cfg = step_cases.with_moe(step_cases.CONFIG, dispatch=dispatch)
  state = step_cases.start(cfg)
  loads = []
  for bias in ([99, 0, 0, 0], [99, 99, 0, 0], [-99, 0, 0, 0]):
    router = state.router._replace(
      bias=jnp.broadcast_to(jnp.array(bias, jnp.float32), state.router.bias.shape)
    )
    grads, sums, *_ = step_cases.differentiate(cfg)(state._replace(router=router), batch())
    assert (
      np.isfinite(step_cases.flat(grads)).all()
      and np.isfinite(sums.loss)
      and step_cases.flat(grads).any()
    )
    loads.append(np.asarray(sums.load))
    dropped = np.asarray(sums.dropped) / np.asarray(sums.stats.copies)
    assert (dropped > 0.8).all() == (dispatch.capacity_factor > 0)
  tokens = loads[0].sum(-1) / 2
  assert (
    (loads[0][:, 0] == tokens).all()
    and (loads[1][:, 2:] == 0).all()
    and (loads[2][:, 0] == 0).all()
  )


@pytest.mark.slow
def test_a_run_that_collapses_says_so_and_goes_on(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """A bias that throws all tokens to and fro, and buffers without room."""
  cfg = config(
    tmp_path / 'run',
    steps=STEPS_UNTIL_ALARM + 20,
    log_every=10,
    eval__every=0,
    checkpoint__every=1000,
    balance__bias_rate='1000',
    model__moe__dispatch__dispatcher='dense_matmul',
    model__moe__dispatch__capacity_factor=1e-9,
  )
  assert train(cfg) == 0
  alarms = [line for line in capsys.readouterr().out.splitlines() if line.startswith('ALARM')]
  for name in ('crowded', 'dropped'):
    assert sum(ALARM_KINDS[name].says in line for line in alarms) == 1, alarms
  last = [row for row in rows(tmp_path / 'run') if 'alarms' in row][-1]
  assert last['alarms'] >= 2 and last['skipped_total'] == 0
