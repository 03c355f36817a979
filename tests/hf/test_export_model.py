"""A run that was not imported is exported, and what is no run is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.manifest import digests
from moejax.config import ConfigError
from moejax.config.flags import parse_flags
from moejax.data.tokenizer import load_tokenizer
from moejax.hf.logits import ONE_DEVICE, read_published_model
from moejax.hf.spelling import export_outlook
from moejax.hf.weights import open_published
from moejax.runtime.launch import Launch
from moejax.train.experiment import run_dir
from moejax.train.experiment.config import DEFAULT_CONFIG, ExperimentConfig
from tests.hf.commands import exported, run, tiny_run, trained_here
from tests.support.published_models import GOLDEN


@pytest.mark.slow
def test_a_run_is_exported_in_float32_and_comes_back_to_the_bit(tmp_path: Path) -> None:
  """As the only family that can hold it, with its tokenizer and the ids of it."""
  model, state = trained_here(tmp_path / 'run', 'deepseek_v3', num_layers=2, mtp_depth=0)
  exported(tmp_path / 'run', tmp_path / 'out')
  source = open_published(tmp_path / 'out')
  assert source.cfg == dataclasses.replace(model, init=source.cfg.init)
  back, bias = read_published_model(source, ONE_DEVICE)
  assert digests(back) == digests(state['model'])
  np.testing.assert_array_equal(bias, state['router'].bias)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == 'float32'
  assert config['eos_token_id'] == 256 and config['vocab_size'] == 257
  generation = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
  assert generation == {'bos_token_id': 256, 'eos_token_id': 256}
  assert load_tokenizer(str(tmp_path / 'out' / 'tokenizer.json')).vocab_size == 257


def test_the_first_run_that_anybody_makes_can_be_published(tmp_path: Path) -> None:
  """That of configs/tiny.py, which is told before it is trained; nothing names its family."""
  first = parse_flags([], ExperimentConfig, DEFAULT_CONFIG)
  assert export_outlook(first) == 'export  as glm4_moe, by python -m moejax.hf export'
  assert first.model.moe.num_shared == 1  # whatever reads the files makes one
  exported(tiny_run(tmp_path / 'run'), tmp_path / 'out')
  source = open_published(tmp_path / 'out')
  assert source.known.model_type == 'glm4_moe' and source.cfg.attention.num_kv_heads == 2
  assert source.config['architectures'] == ['Glm4MoeForCausalLM']


def test_a_bias_that_files_cannot_hold_is_not_left_out(
  tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
  trained_here(tmp_path / 'run', 'mixtral')
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}') == 2
  assert 'router.bias is not zero' in capfd.readouterr().err and {*os.listdir(tmp_path)} == {'run'}


def test_published_files_are_not_taken_for_a_run(
  tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
  for argv in (
    ['export', f'--workdir={GOLDEN / "llama"}', f'--out={tmp_path / "x"}'],
    ['export', f'--workdir={tmp_path}', f'--out={tmp_path / "x"}'],
  ):
    assert run(*argv) == 2
  first, second = capfd.readouterr().err.splitlines()
  assert 'holds a published model: import it with `python -m moejax.hf import ' in first
  assert 'holds no config.json: name the directory of a run' in second and not os.listdir(tmp_path)
  with pytest.raises(ConfigError, match='import'):
    run_dir.open_run(str(GOLDEN / 'llama'))


def test_a_damaged_step_is_not_exported_but_the_one_before_it(
  tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
  """Which is found while the tensors are written; nothing is left of that."""
  _, state = trained_here(tmp_path / 'run', 'glm4_moe', num_layers=2, mtp_depth=0)
  writer = Checkpoints(tmp_path / 'run' / 'checkpoints', CheckpointConfig())
  writer.save(4, {**state, 'model': jax.tree.map(lambda leaf: leaf + 1, state['model'])}, {})
  writer.close()
  states = [tmp_path / 'run' / 'checkpoints' / step / 'state' for step in ('3', '4')]
  shutil.rmtree(states[1])
  shutil.copytree(*states)
  exported(tmp_path / 'run', tmp_path / 'out')
  assert 'exported step 3 of ' in capfd.readouterr().err
  assert 'checkpoint 4 is damaged' in caplog.text and 'does not match its digest' in caplog.text
  assert {*os.listdir(tmp_path)} == {'run', 'out'}
  shutil.rmtree(states[0])
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "x"}') == 3
  assert {*os.listdir(tmp_path)} == {'run', 'out'}


def test_only_imports_and_exports_are_many_processes(
  tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  joined: list[Launch] = []
  monkeypatch.setattr('moejax.hf.__main__.connect', joined.append)
  flags = ['--coordinator=host:1234', '--num_processes=2', '--process_id=1']
  assert run('show', GOLDEN / 'llama', *flags) == 2
  assert 'show is for one process: leave out --coordinator' in capfd.readouterr().err
  assert run('import', GOLDEN / 'llama', f'--out={tmp_path}/run', flags[0]) == 2
  assert '--num_processes and --process_id missing' in capfd.readouterr().err and not joined
  assert run('import', GOLDEN / 'llama', f'--out={tmp_path}/run', *flags) == 0
  assert run('export', f'--workdir={tmp_path}/run', f'--out={tmp_path}/out', *flags) == 0
  assert joined == [Launch('host:1234', 2, 1)] * 2
