"""A run that was not imported is exported, and what is no run is refused."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.manifest import digests
from moejax.config import ConfigError
from moejax.data.tokenizer import load_tokenizer
from moejax.hf.logits import ONE_DEVICE, read_published_model
from moejax.hf.weights import open_published
from moejax.train.experiment import run_dir
from tests.hf.commands import exported, run, trained_here
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
