"""Every benchmark runs, as a real process at its smallest size, and prints what it is to
measure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import ROOT
from tests.support.trainer_process import PATIENCE, environment

# benchmark -> a row of its table, with a figure in it
ROWS = {
  'compiled_step': r'operations run .*\d',
  'balance_rules': r'sign bias .*\d\.\d{3} ',
  'decode': r'guesses, always right .*\d+\.\d \(',
  'gpu': r'layer +tiny +Zipf +moejax +forward \d',
  'import_checkpoint': r'all, as the command .*\d+\.\d',
  'metrics_cost': r'smallest .*\d+ .*\d\.\d{3} \(',
  'moe_layer': r'sparse_matmul: ratio .*\d\.\d\d \(',
  'processes': r'data=2 .*\d+ \(.*\d\.\d\d \(',
  'start_up': r'warm .*\d+\.\d \(',
  'train_step': r'moejax .*\d+ \(\d+ - \d+\)',
}


def test_every_benchmark_is_run() -> None:
  # load_picture measures nothing: test_docs.py draws with it what the README shows.
  others = {'load_picture'}
  assert {path.stem for path in (ROOT / 'benchmarks').glob('*.py')} == {*ROWS} | others


@pytest.mark.slow
@pytest.mark.parametrize('name', ROWS)
def test_a_benchmark_prints_a_row_with_a_figure(name: str, tmp_path: Path) -> None:
  only = ['--only=sign'] if name == 'balance_rules' else []
  done = subprocess.run(
    [sys.executable, '-m', f'benchmarks.{name}', '--quick', *only],
    cwd=ROOT,
    env=environment(XDG_CACHE_HOME=str(tmp_path)),
    capture_output=True,
    text=True,
    timeout=PATIENCE,
  )
  assert done.returncode == 0, done.stderr
  assert re.search(ROWS[name], done.stdout), done.stdout
