"""TensorBoard reads what was written, once, without TensorFlow."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.runtime import faults
from moejax.train.telemetry.load_plots import load_image
from moejax.train.telemetry.tensorboard import TensorBoard
from tests.train.telemetry.event_files import events, series


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
