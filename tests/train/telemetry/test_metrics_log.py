"""Metrics: the log survives a kill, TensorBoard reads what was written, pictures show what they are
of."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.runtime import faults
from moejax.runtime.append_log import AppendLog
from moejax.train.experiment.cost import mfu
from moejax.train.telemetry.load_plots import load_bars, load_image, png
from moejax.train.telemetry.metrics_log import MetricsLog
from moejax.train.telemetry.tensorboard import TensorBoard

# ---- pictures


def test_picture_is_blue_below_white_at_and_red_above_the_mean() -> None:
  history = np.array([[0, 1, 1, 2], [3, 3, 3, 3], [0, 0, 0, 9], [0, 0, 0, 0]], float)
  picture = load_image(history)
  high, wide = picture.shape[0] // 4, picture.shape[1] // 4
  cells = picture[::high, ::wide].astype(int)  # [E, steps, 3]
  assert picture.dtype == np.uint8 and high >= 3 and wide >= 1
  assert (cells[1, 0] == 255).all() and (cells[:, 1] == 255).all()
  red_over_blue = cells[..., 0] - cells[..., 2]
  assert (red_over_blue[:, 2] < 0).tolist() == [True, True, True, False] and red_over_blue[3, 2] > 0
  assert red_over_blue[3, 0] > 0 and (red_over_blue[:, 3] < 0).all()
  assert (load_image(history * 7) == picture).all()  # relative to the mean


@pytest.mark.parametrize(
  ('steps', 'experts'), [(1, 1), (1, 8), (7, 8), (2500, 4), (30, 256), (3, 600)]
)
def test_picture_shows_every_expert_at_a_size_that_can_be_seen(steps: int, experts: int) -> None:
  history = np.ones((steps, experts))
  history[:, experts // 2] += 5
  height, width, _ = load_image(history).shape
  assert height % experts == 0 and height // experts >= 3 and 24 <= width <= 900
  rows = load_image(history)[:: height // experts, 0].astype(int)
  assert experts == 1 or np.argmax(rows[:, 0] - rows[:, 2]) == experts // 2


def test_png_is_the_picture() -> None:
  from PIL import Image

  picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
  assert (np.asarray(Image.open(io.BytesIO(png(picture)))) == picture).all()


def test_bars() -> None:
  assert load_bars(np.full(4, 3.0)) == '▄▄▄▄' and load_bars(np.zeros(3)) == '   '
  assert (
    load_bars(np.array([0.0, 1, 1, 2])) == ' ▄▄█' and load_bars(np.array([1.0, 11, 24])) == ' ▄█'
  )


# ---- metrics.jsonl


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


# ---- TensorBoard


def events(directory: Path) -> object:
  # The server's reader; `event_accumulator` beside it is for scripts.
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

  found = EventAccumulator(str(directory), tensor_size_guidance={'scalars': 0})
  found.Reload()
  return found


def series(found: object, tag: str) -> list[tuple[int, float]]:
  from tensorboard.util.tensor_util import make_ndarray

  return [(e.step, float(make_ndarray(e.tensor_proto))) for e in found.Tensors(tag)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
  from PIL import Image

  board = TensorBoard(tmp_path, 0)
  board.scalars(1, {'loss': 2.5, 'balance/sequence': math.nan})
  picture = load_image(np.arange(12.0).reshape(3, 4))
  board.image('expert_load/layer_0', picture, 1)
  board.text('sample', 'def __init__(self):\n  pass', 1)
  found = events(tmp_path)  # before it is closed
  assert series(found, 'loss') == [(1, 2.5)] and math.isnan(series(found, 'balance/sequence')[0][1])
  width, height, data = found.Tensors('expert_load/layer_0')[0].tensor_proto.string_val
  assert (int(height), int(width)) == picture.shape[:2]
  assert (np.asarray(Image.open(io.BytesIO(data))) == picture).all()
  assert (
    found.Tensors('sample')[0].tensor_proto.string_val[0]
    == b'    def __init__(self):\n      pass\n'
  )
  plugins = {
    tag: found.SummaryMetadata(tag).plugin_data.plugin_name for tag in found.Tags()['tensors']
  }
  assert plugins == {
    'loss': 'scalars',
    'balance/sequence': 'scalars',
    'expert_load/layer_0': 'images',
    'sample': 'text',
  }
  board.close()


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
  for start, end in [(0, 6), (4, 8), (8, 9), (2, 3)]:
    board = TensorBoard(tmp_path, start)
    for step in range(start + 1, end + 1):
      board.scalars(step, {'loss': 100 * start + step})
    board.close()
    steps = [step for step, _ in series(events(tmp_path), 'loss')]
    assert steps == list(range(1, end + 1))
  assert series(events(tmp_path), 'loss') == [(1, 1), (2, 2), (3, 203)]


def test_no_tensorflow_even_where_there_is_one_and_nothing_heavy_to_import(tmp_path: Path) -> None:
  (tmp_path / 'tensorflow.py').write_text('raise SystemExit("tensorflow was imported")\n')
  code = (
    'import sys; import moejax.train.telemetry.tensorboard as m; import numpy as np; import jax\n'
    'assert not {"tensorboard", "PIL"} & sys.modules.keys()\n'
    'b = m.TensorBoard(sys.argv[1] + "/b", 0); b.scalars(1, {"a": 1.0}); b.text("t", "x", 1)\n'
    'from moejax.train.telemetry.load_plots import load_image\n'
    'b.image("i", load_image(np.ones((2, 2))), 1); b.close()\n'
    'print("fine")'
  )
  env = os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{Path(__file__).parents[3]}'}
  run = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, env=env
  )
  assert run.stdout == 'fine\n', run.stderr


# ---- throughput


def test_mfu_is_a_share_of_the_peak_and_zero_where_that_is_unknown() -> None:
  class Device:
    def __init__(self, kind: str) -> None:
      self.device_kind = kind

  peaks = {
    'TPU v5 lite': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6e': 918e12,
    'TPU v4': 275e12,
    'NVIDIA H200': 989e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA L40S': 362e12,
    'NVIDIA L4': 121e12,
  }
  for kind, peak in peaks.items():
    assert mfu(1000.0, peak / 1000, [Device(kind)] * 4) == pytest.approx(1 / 4), kind
  assert mfu(1000.0, 1e9, jax.devices('cpu')) == 0


# ---- a full disk

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


def test_the_head_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The session START, without which TensorBoard shows what an earlier process wrote of later
  steps."""
  board = TensorBoard(tmp_path, 0)
  for step in range(1, 5):
    board.scalars(step, {'loss': step})
  board.close()
  board = TensorBoard(tmp_path, 2)
  now = {('log', faults._passed['log'] + 1): 'full'}
  with monkeypatch.context() as patched:
    patched.setattr(faults, 'parse_environment', lambda: now)
    board.scalars(3, {'loss': 30})
  board.scalars(4, {'loss': 40})
  board.close()
  assert series(events(tmp_path), 'loss') == [(1, 1), (2, 2), (4, 40)]
