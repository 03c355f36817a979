"""`moejax COMMAND`: which commands there are, what each is given, and one wording of bad usage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.__main__ import COMMANDS, run_moejax

ROOT = Path(__file__).parents[1]


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
  for argv in ([], ['-h'], ['--help']):
    assert run_moejax(argv) == 0
    out = capsys.readouterr().out
    assert all(f'moejax {name} ' in out for name in COMMANDS)


@pytest.mark.parametrize(
  'name,module',
  [
    ('train', 'moejax.train.__main__'),
    ('plan', 'moejax.plan.__main__'),
    ('generate', 'moejax.generate'),
    ('hf', 'moejax.hf.__main__'),
    ('certify', 'moejax.certify.__main__'),
  ],
)
def test_a_command_gets_the_other_arguments_and_gives_the_status(
  name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  given: list[list[str]] = []
  monkeypatch.setattr(f'{module}.main', lambda argv, *note: given.append([*argv]) or 7)
  assert run_moejax([name, '--a=b', 'c']) == 7 and given == [['--a=b', 'c']]


@pytest.mark.parametrize('flag', ['--plan', '--plan=fit', '--topology=cpu:8'])
def test_a_training_that_is_to_be_planned_is_a_plan(
  flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr('moejax.plan.__main__.main', lambda argv: 7)
  monkeypatch.setattr('moejax.train.__main__.main', pytest.fail)
  assert run_moejax(['train', flag]) == 7


def test_an_unknown_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
  assert run_moejax(['tran']) == 2
  assert capsys.readouterr().err == (
    'moejax: tran: no such command; did you mean train? '
    'use one of train, plan, generate, hf, certify\n'
  )


def test_usage_errors_of_all_commands_read_alike(capsys: pytest.CaptureFixture[str]) -> None:
  wrong = {
    'train': ['stray'],
    'plan': [],
    'generate': ['--workdir=runs/a', '--stray'],
    'hf': ['export', '--workdir=runs/a', '--out=b', '--stray'],
    'certify': ['--only=nothing'],
  }
  assert {*wrong} == {*COMMANDS}
  for name, argv in wrong.items():
    assert_usage_error(name, argv, capsys)


def assert_usage_error(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
  """What the command says, which is one line in the words of all."""
  try:
    assert run_moejax([name, *argv]) == 2
  except SystemExit as stop:
    assert stop.code == 2
  out, err = capsys.readouterr()
  assert err.startswith(f'moejax.{name}: ') and err.count('\n') == 1 and not out, err
  return err


@pytest.mark.parametrize(
  'argv',
  [
    ['train', '--config=URL'],
    ['train', '--workdir=URL'],
    ['train', '--config.init_from=URL'],
    ['train', '--config.data.tokenizer=URL/tokenizer.json'],
    ['generate', '--prompt=a', '--workdir=URL'],
    ['hf', 'import', 'URL', '--out=m'],
    ['hf', 'import', 'm', '--out=URL'],
    ['hf', 'export', '--workdir=URL', '--out=m'],
    ['hf', 'export', '--workdir=m', '--out=URL'],
    ['hf', 'logits', '--model=URL', '--tokens=t.npy', '--out=l.npy'],
    ['hf', 'logits', '--model=m', '--tokens=URL', '--out=l.npy'],
    ['hf', 'logits', '--model=m', '--tokens=t.npy', '--out=URL'],
    ['hf', 'show', 'URL'],
    ['certify', '--out=URL'],
    ['certify', '--readme=URL'],
  ],
)
def test_a_path_in_an_object_store_is_refused_wherever_one_is_taken(
  argv: list[str],
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.chdir(tmp_path)
  assert run_moejax([part.replace('URL', 'gs://bucket/x') for part in argv]) == 2
  out, err = capsys.readouterr()
  lines = err.splitlines()
  assert not out and all('gs://bucket/x' in line and 'mount it' in line for line in lines), err
  assert lines and not [*tmp_path.iterdir()]


def test_every_command_knows_the_home_directory(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr('moejax.plan.topology.set_environment', lambda topology: None)
  (tmp_path / 'run').mkdir()
  for argv in (
    ['train', '--config=~/run'],
    ['plan', '--topology=cpu:1', '--config=~/run'],
    ['generate', '--workdir=~/run'],
    ['hf', 'export', '--workdir=~/run', '--out=~/b'],
    ['hf', 'show', '~/run'],
    ['hf', 'import', '~/run', '--out=~/b'],
  ):
    said = assert_usage_error(argv[0], argv[1:], capsys)
    assert f'{tmp_path}/run' in said and 'holds no config.json' in said, said


def test_the_help_of_a_plan_is_help(capsys: pytest.CaptureFixture[str]) -> None:
  assert run_moejax(['plan', '--help']) == 0
  assert 'moejax plan --topology=v5p:8x8x8' in capsys.readouterr().out


def test_a_config_file_and_its_plugins_import_from_the_current_folder(tmp_path: Path) -> None:
  """As the installed script runs it: the folder of the script, and not this one, is on the path."""
  (tmp_path / 'own.py').write_text('STEPS = 0\n')
  (tmp_path / 'mine.py').write_text(
    'import own\nfrom configs.tiny import get_config as tiny\n'
    'def get_config():\n  config = tiny()\n  config.steps = own.STEPS - 3\n  return config\n'
  )
  script = 'import sys; from moejax.__main__ import main; sys.path.remove(""); sys.exit(main())'
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'GLIBC_TUNABLES': ''}
  done = subprocess.run(
    [sys.executable, '-c', script, 'train', '--config=mine.py'],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and 'config: steps=-3: use 0' in done.stderr, done.stderr
