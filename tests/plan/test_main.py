"""`moejax plan`: whose config is planned. What a plan says of one is in test_planner.py."""

import sys
from pathlib import Path

import pytest

from moejax.plan import __main__ as plan
from moejax.plan import planner
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.run_dir import write_config
from tests.support.tiny_run import config


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[ExperimentConfig]:
  """The configs that a plan was made of; nothing is compiled, and this process is as it was."""
  seen: list[ExperimentConfig] = []
  monkeypatch.setattr('moejax.plan.topology.set_environment', lambda topology: None)
  monkeypatch.setattr(planner, 'print_plan', lambda cfg, *rest: seen.append(cfg) or 0)
  return seen


def test_the_run_in_a_directory_is_planned(
  planned: list[ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As `moejax train` would go on with it: with its plugins, and with what flags change."""
  (tmp_path / 'my_plugin.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  run = config(tmp_path / 'run', plugins=('my_plugin',))
  write_config(run)
  del sys.modules['my_plugin']  # which making the config has imported
  argv = ['--topology=cpu:1', f'--config={run.workdir}', '--config.batch_size=16']
  assert plan.main(argv) == 0
  assert planned == [config(tmp_path / 'run', plugins=('my_plugin',), batch_size=16)]
  assert sys.modules.pop('my_plugin')


def test_what_would_start_from_an_import_is_planned_without_a_directory_of_its_own(
  planned: list[ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  write_config(config(tmp_path / 'import', steps=0))
  assert plan.main(['--topology=cpu:1', '--config=~/import']) == 0
  assert plan.main(['--topology=cpu:1', '--config.init_from=~/import', '--workdir=w']) == 0
  first, second = planned
  assert first.init_from == second.init_from == str(tmp_path / 'import')
  assert (first.steps, second.workdir) == (500, 'w')


def test_a_directory_that_is_no_run_is_an_error(
  planned: list[ExperimentConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert plan.main(['--topology=cpu:1', f'--config={tmp_path}']) == 2
  assert 'holds no config.json: name the directory of a run' in capsys.readouterr().err
  assert not planned
