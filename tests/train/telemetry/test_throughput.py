"""How fast a run trains, and how long its devices wait for a batch."""

import time
from types import SimpleNamespace

import pytest

from moejax.train.telemetry.throughput import Throughput
from moejax.train.trainer import next_batch


class Clock:
  """A clock that tests move."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.now = 100.0
    monkeypatch.setattr(time, 'perf_counter', lambda: self.now)


def test_tokens_a_second_are_counted_since_the_clock_was_resumed_and_waits_since_the_last_row(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  clock = Clock(monkeypatch)
  throughput = Throughput(tokens_per_step=10, flops_per_token=1)
  throughput.add_wait(0.5)
  throughput.count_step()
  clock.now += 2
  assert throughput.row() == {'tokens_per_second': 5.0, 'mfu': 0.0, 'input_wait': 0.5}
  clock.now += 98  # a validation
  throughput.resume()
  throughput.count_step()
  clock.now += 1
  assert throughput.row() == {'tokens_per_second': 10.0, 'mfu': 0.0, 'input_wait': 0.0}


@pytest.mark.parametrize(
  ('has_ended', 'waited'),
  [([], 3.0), ([True], 3.0), ([False], 0.0)],
  ids=['no step before', 'the step before has ended', 'the step before runs'],
)
def test_devices_wait_for_a_batch_where_no_step_runs(
  monkeypatch: pytest.MonkeyPatch, has_ended: list[bool], waited: float
) -> None:
  clock = Clock(monkeypatch)

  def slow_batch(step: int, rows: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    clock.now += 3
    return step, rows

  throughput = Throughput(tokens_per_step=10, flops_per_token=1)
  run = SimpleNamespace(
    data=SimpleNamespace(batch=slow_batch),
    programs=SimpleNamespace(put=lambda batch: batch, rows=(0, 1)),
    journal=SimpleNamespace(throughput=throughput),
  )
  running = []
  for ended in has_ended:
    running.append((6, {'loss': SimpleNamespace(is_ready=lambda ended=ended: ended)}))
  assert next_batch(run, 7, running) == (7, (0, 1))
  assert throughput.waited == waited
