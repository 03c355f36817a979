"""metrics.jsonl: it survives a kill, is cut back where a run goes on, and on a full disk loses
whole lines."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.runtime.append_log import AppendLog
from moejax.train.telemetry.metrics_log import MetricsLog
from tests.train.telemetry.event_files import events, series


def test_log_holds_what_was_written_and_null_for_what_json_has_not(tmp_path: Path) -> None:
  log = MetricsLog(tmp_path / 'm.jsonl', 0)
  array = np.array([1.0, -math.inf])
  log.write(
    {'step': 1, 'loss': math.nan, 'load': [[1, math.inf]], 'x': np.float32(0.5), 'y': array}
  )
  log.write({'step': 2, 'loss': jnp.float32(0.1)})
  text = (tmp_path / 'm.jsonl').read_text()  # before it is closed
  rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
  assert rows == log.rows()
  assert rows[0] == {'step': 1, 'loss': None, 'load': [[1, None]], 'x': 0.5, 'y': [1, None]}
  assert np.float32(rows[1]['loss']) == np.float32(0.1)


def test_log_is_cut_back_to_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
  path = tmp_path / 'm.jsonl'
  line = {step: json.dumps({'step': step, 'loss': 0.1 * step}) + '\n' for step in range(1, 9)}
  for whole in (3, 5, 8):
    for torn in ('', '{"step": 2, "lo', '{"step": 2}', '\0\0\0\n', '[2]\n', '{"loss": 2}\n'):
      for start in (0, 2, 5, 9):
        path.write_text(''.join(line[s] for s in range(1, whole + 1)) + torn)
        log = MetricsLog(path, start)
        log.write({'step': start + 1, 'loss': 0.1 * (start + 1)})
        log.close()
        want = [line[s] for s in range(1, min(whole, start) + 1)]
        assert path.read_text().splitlines(keepends=True)[:-1] == want
        assert log.rows()[-1]['step'] == start + 1
  assert [p.name for p in tmp_path.iterdir()] == ['m.jsonl']


def test_a_log_with_nothing_to_cut_is_not_written_anew(tmp_path: Path) -> None:
  path = tmp_path / 'm.jsonl'
  path.write_text('{"step": 1}\n')
  before = path.stat().st_ino
  MetricsLog(path, 1).close()
  assert path.stat().st_ino == before
  MetricsLog(path, 0).close()
  assert (
    path.stat().st_ino != before and path.read_text() == ''
  )  # replaced whole, never cut in place


LIMITED = """
import json, logging, resource, sys
from pathlib import Path
import numpy as np
from moejax.runtime import faults
from moejax.runtime.append_log import AppendLog
from moejax.train.telemetry.metrics_log import MetricsLog
from moejax.train.telemetry.tensorboard import TensorBoard
from moejax.train.telemetry.routing_probe import Probes

def room(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

logging.basicConfig(format='%(message)s')
home = Path(sys.argv[1])
log, board = MetricsLog(home / 'm.jsonl', 0), TensorBoard(home / 'board', 0)
probes = Probes(home / 'probes', 0)
probe = np.arange(4000, dtype=np.uint16).reshape(1, 2000, 2)
for step in range(1, 9):
  room(230 if 3 <= step <= 5 else resource.RLIM_INFINITY)   # the third line is torn at 230 bytes
  log.write({'step': step, 'text': 80 * 'x'})
  board.scalars(step, {'loss': step})
  churn = probes.record(step, probe)
  assert churn == {} if step == 1 else not churn['churn'].any()
  assert log.rows()[-1]['step'] == (2 if 3 <= step <= 5 else step)
assert [row['step'] for row in log.rows()] == [1, 2, 6, 7, 8] and probes.steps() == [1, 2, 6, 7, 8]
assert sorted(probes.saturation()) == [1, 2, 6, 7] and not list((home / 'probes').glob('*.tmp'))
"""


def test_what_does_not_fit_is_lost_whole_and_told_once(tmp_path: Path) -> None:
  run = subprocess.run(
    [sys.executable, '-c', LIMITED, str(tmp_path)],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[3])},
  )
  assert run.returncode == 0, run.stderr
  assert (
    run.stderr.count('training goes on') == 1 and run.stderr.count('there is room again') == 1
  ), run.stderr
  assert 'm.jsonl: File too large: training goes on' in run.stderr
  steps = [step for step, _ in series(events(tmp_path / 'board'), 'loss')]
  assert {1, 6, 7, 8} <= {*steps} and not {4, 5} & {*steps}


def test_a_device_that_is_always_full() -> None:
  log = AppendLog('/dev/full')
  assert not log.write(b'a line\n') and not log.write(b'another\n')
  log.close()
