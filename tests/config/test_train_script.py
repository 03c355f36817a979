"""train.py: the config goes to the trainer, problems to stderr; it starts again once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.config.small_config import REAL, Root


@pytest.fixture
def stub(default: str, monkeypatch: pytest.MonkeyPatch) -> list[Root]:
  """train.py with a small config and a trainer that only keeps what it is given."""
  seen: list[Root] = []
  monkeypatch.setattr('moejax.train.experiment.config.ExperimentConfig', Root)
  monkeypatch.setattr('moejax.train.trainer.train', lambda config, *notes: seen.append(config) or 4)
  monkeypatch.setattr('moejax.hf.spelling.export_outlook', str)
  return seen


def test_train_gives_the_config_to_the_trainer_and_returns_its_status(
  stub: list[Root], default: str
) -> None:
  assert train.main([f'--config={default}', '--workdir=w', '--config.steps=3']) == 4
  assert stub == [Root(steps=3, workdir='w')]


def test_train_tells_problems_on_stderr_and_returns_2(
  stub: list[Root], default: str, capsys: pytest.CaptureFixture[str]
) -> None:
  assert train.main([f'--config={default}', 'steps=9', '--config.steps=0']) == 2
  out, err = capsys.readouterr()
  assert not out and not stub and 'Traceback' not in err
  assert (
    'steps=9: no such flag; did you mean --config.steps=9?' in err
    and 'steps=0 is not positive' in err
  )


def test_help_shows_usage_and_every_field_with_its_value(
  stub: list[Root], default: str, capsys: pytest.CaptureFixture[str]
) -> None:
  assert train.main([f'--config={default}', '--help']) == 0
  out = capsys.readouterr().out
  assert (
    'python train.py' in out
    and '--config.steps=5\n' in out
    and '--config.losses.sequence=0.01' in out
  )
  assert '--config.model.router.top_k=2' in out and not stub


def test_train_starts_again_once_with_huge_pages_and_keeps_the_process() -> None:
  code = """
import os, runpy, sys
sys.platform, sys.argv = 'linux', ['train.py']
def execv(program, argv):
  print(os.getpid(), argv[1:], os.environ['GLIBC_TUNABLES'])
  sys.exit(0)
os.execv = execv
runpy.run_path('train.py', run_name='__main__')
"""
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  root = Path(train.__file__).parent
  done = subprocess.Popen(
    [sys.executable, '-c', code], env=env, cwd=root, stdout=subprocess.PIPE, text=True
  )
  out = done.communicate()[0]
  assert out.startswith(f"{done.pid} ['-c'") and out.strip().endswith('glibc.malloc.hugetlb=1')


def test_a_real_process_tells_all_problems_and_exits_2_before_anything_runs(tmp_path: Path) -> None:
  path = tmp_path / 'real.py'
  path.write_text(REAL)
  argv = [
    f'--config={path}',
    f'--workdir={tmp_path / "run"}',
    'steps=9',
    '--config.model.d_modle=3',
    '--config.steps=x',
    '--config.batch_size=8',
    '--config.micro_batches=3',
    '--config.balance.bias_rule=sign',
    '--config.model.moe.router.selection=hash',
    '--config.balance.losses.global_batch=0.1',
  ]
  root = Path(train.__file__).parent
  done = subprocess.run(
    [sys.executable, 'train.py', *argv], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 2 and not done.stdout and 'Traceback' not in done.stderr
  for part in (
    'steps=9',
    'd_modle',
    'config.model.d_model',
    '--config.steps=x',
    'micro_batches=3',
    'size=8',
    "bias_rule='sign' would move a bias that selection='hash' ignores: use selection='top_k'",
  ):
    assert part in done.stderr
  assert not (tmp_path / 'run').exists()
