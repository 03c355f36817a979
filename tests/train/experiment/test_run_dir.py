"""The directory of a run: what is read from it, and what is said where something is missing."""

import json
from pathlib import Path

import pytest

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.config import ConfigError, from_config_dict, to_config_dict
from moejax.config.flags import parse_flags
from moejax.data.tokenizer import load_tokenizer
from moejax.moe.balance import losses
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.run_dir import (
  CONFIG_FILE,
  TOKENIZER_FILE,
  config_from_run,
  open_run,
  read_config,
  read_setup,
  read_tokenizer,
  write_config,
)
from tests.support.tiny_run import CONFIG, config


def test_a_config_is_read_as_it_was_written_wherever_the_run_lies_now(tmp_path: Path) -> None:
  cfg = config(tmp_path / 'run')
  write_config(cfg)
  assert read_config(cfg.workdir) == cfg
  (tmp_path / 'run').rename(tmp_path / 'moved')
  assert read_config(str(tmp_path / 'moved')).workdir == str(tmp_path / 'moved')


def test_a_config_of_before_a_field_was_there_is_read_with_its_default(tmp_path: Path) -> None:
  """As of a run whose model had no pattern of layers, and shared experts as wide as others."""
  cfg = config(tmp_path / 'run', model__num_layers=4, model__num_dense_layers=2)
  write_config(cfg)
  path = tmp_path / 'run' / CONFIG_FILE
  fields = json.loads(path.read_text())
  del fields['model']['ffn_pattern'], fields['model']['moe']['d_shared']
  path.write_text(json.dumps(fields))
  assert read_config(cfg.workdir) == cfg
  assert cfg.model.has_experts == (False, False, True, True)


OWN_LOSS = """
from moejax.moe.balance.losses import BALANCE_LOSSES
BALANCE_LOSSES['own_loss'] = BALANCE_LOSSES['sequence']
"""


def test_a_run_with_a_loss_of_ones_own_is_read_by_a_process_that_never_saw_it(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / 'own_losses.py').write_text(OWN_LOSS)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr('moejax.moe.balance.losses.BALANCE_LOSSES', dict(BALANCE_LOSSES))
  for module in ('moejax.moe.balance.config', 'moejax.moe.balance.fit'):
    monkeypatch.setattr(f'{module}.BALANCE_LOSSES', losses.BALANCE_LOSSES)
  fields = {'balance': {'losses': {'own_loss': 0.1}}, 'plugins': ['own_losses']}
  (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {'plugins': []}))
  with pytest.raises(ConfigError, match='own_loss is not a balance loss') as error:
    read_config(str(tmp_path))
  assert f'{tmp_path}/config.json names no plugins: a loss' in str(error.value)
  (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
  cfg = read_config(str(tmp_path))
  assert cfg.plugins == ('own_losses',) and cfg.balance.active() == ('own_loss',)
  write_config(cfg)
  assert json.loads((tmp_path / CONFIG_FILE).read_text())['plugins'] == ['own_losses']


def test_a_plugin_that_is_not_there_is_named(tmp_path: Path) -> None:
  with pytest.raises(ConfigError) as error:
    config(tmp_path / 'run', plugins=('no_such_module',))
  assert (
    "config.plugins: 'no_such_module': ModuleNotFoundError: No module named 'no_such_module'; name "
    "a module, as ('my.losses',), whose folder is on PYTHONPATH"
  ) in str(error.value)


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  cfg = ExperimentConfig(workdir='~/run', init_from='~/other')
  assert (cfg.workdir, cfg.init_from) == (f'{tmp_path}/run', f'{tmp_path}/other')
  write_config(cfg)
  assert read_config('~/run') == cfg


@pytest.mark.parametrize('url', ['gs://bucket/run', 's3://bucket/run', 'file:///run'])
def test_a_path_in_an_object_store_is_refused_with_a_remedy(
  url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  for field in ('workdir', 'init_from', 'data.path', 'data.cache_dir'):
    changed = to_config_dict(CONFIG)
    changed.update_from_flattened_dict({field: url})
    with pytest.raises(ConfigError) as error:
      from_config_dict(ExperimentConfig, changed)
    told = f'{field}={url}: {url.partition("//")[0]}// is not read or written'
    assert told in str(error.value) and 'mount it' in str(error.value)
  for read in (read_config, read_setup, open_run):
    with pytest.raises(ConfigError, match='mount it'):
      read(url)
  assert not [*tmp_path.iterdir()]


def test_a_directory_that_is_no_run_is_one_error(tmp_path: Path) -> None:
  for missing in (tmp_path / 'nowhere', tmp_path):
    for read in (read_config, read_setup, open_run):
      with pytest.raises(ConfigError, match='holds no config.json: name the directory of a run'):
        read(str(missing))
  assert not (tmp_path / 'nowhere').exists()


def test_a_published_model_is_to_be_imported(tmp_path: Path) -> None:
  (tmp_path / CONFIG_FILE).write_text(json.dumps({'model_type': 'llama'}))
  with pytest.raises(ConfigError) as error:
    read_setup(str(tmp_path))
  assert f'import it with `python -m moejax.hf import {tmp_path} --out=DIR`' in str(error.value)


def test_a_tokenizer_must_fit_its_model(tmp_path: Path) -> None:
  assert read_tokenizer(tmp_path) is None
  written = load_tokenizer('bytes')
  written.save(tmp_path / TOKENIZER_FILE)
  size = written.vocab_size
  for enough in (0, size, size + 1):
    assert read_tokenizer(tmp_path, enough).vocab_size == size
  with pytest.raises(ConfigError, match=f'below vocab_size={size - 1} .*, found {size - 1}: is it'):
    read_tokenizer(tmp_path, size - 1)


def test_the_vocabulary_is_the_tokenizers_where_the_config_has_none(tmp_path: Path) -> None:
  cfg = config(tmp_path / 'run')
  write_config(cfg)
  with pytest.raises(ConfigError, match='tokenizer.json is missing, .* model.vocab_size=0'):
    read_setup(cfg.workdir)
  tokenizer = load_tokenizer('bytes')
  tokenizer.save(tmp_path / 'run' / TOKENIZER_FILE)
  setup = read_setup(cfg.workdir)
  assert setup.cfg.model.vocab_size == setup.tokenizer.vocab_size == tokenizer.vocab_size
  assert read_config(cfg.workdir).model.vocab_size == 0


def test_a_run_that_has_saved_nothing_cannot_be_opened(tmp_path: Path) -> None:
  cfg = config(tmp_path / 'run', model__vocab_size=300)
  write_config(cfg)
  with pytest.raises(NoLoadableCheckpoint, match='has no checkpoint yet: train it first'):
    open_run(cfg.workdir)
  assert [path.name for path in (tmp_path / 'run').iterdir()] == [CONFIG_FILE]


def test_a_run_is_named_again_and_an_import_is_gone_on_from(tmp_path: Path) -> None:
  """In the place of a config file; with `is_source`, any run is what a new one starts from."""
  run = config(tmp_path / 'run')
  write_config(run)
  assert dict(config_from_run(run.workdir, False)) == dict(to_config_dict(run))
  source = config_from_run(run.workdir, True)
  assert (source.init_from, source.workdir, source.steps) == (run.workdir, '', run.steps)
  assert source.data.tokenizer == run.data.tokenizer
  imported = config(tmp_path / 'import', steps=0)
  write_config(imported)
  load_tokenizer('bytes').save(tmp_path / 'import' / TOKENIZER_FILE)
  source = config_from_run(imported.workdir, False)
  assert (source.init_from, source.workdir, source.steps) == (imported.workdir, '', 500)
  assert source.data.tokenizer == f'{imported.workdir}/{TOKENIZER_FILE}'


def test_flags_change_the_config_of_a_run(tmp_path: Path) -> None:
  run = config(tmp_path / 'run')
  write_config(run)

  def parsed(*argv: str) -> ExperimentConfig:
    return parse_flags([*argv], ExperimentConfig, str(tmp_path / 'no.py'), config_from_run)

  assert parsed(f'--config={run.workdir}', '--config.steps=99') == config(
    tmp_path / 'run', steps=99
  )
  new = parsed(f'--config.init_from={run.workdir}', f'--workdir={tmp_path / "new"}')
  assert new == config(tmp_path / 'new', init_from=run.workdir, data__cache_dir=run.data.cache_dir)
  for argv, told in (
    ([f'--config.init_from={run.workdir}'], "workdir='': name a directory"),
    ([f'--config.init_from={tmp_path}'], 'holds no config.json: name the directory of a run'),
    ([f'--config={tmp_path}'], 'holds no config.json: name the directory of a run'),
  ):
    with pytest.raises(ConfigError, match=told):
      parsed(*argv)
