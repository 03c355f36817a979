"""What others read: transformers computes the same logits from the files that we write."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.families import FAMILIES
from tests.hf.commands import exported, logits_of
from tests.support.published_models import random_model, written

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures('cheap_programs')


@SLOW
def test_a_recipe_trains_is_exported_and_transformers_computes_the_same(tmp_path: Path) -> None:
  """DeepSeek-V3's, tiny: logits to 1e-4, from the files alone."""
  pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  command = [
    sys.executable,
    'train.py',
    '--config=configs/deepseek_v3.py:tiny',
    '--config.steps=20',
    '--config.eval.every=0',
    f'--config.workdir={tmp_path / "run"}',
  ]
  subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {'XLA_FLAGS': ''})
  exported(tmp_path / 'run', tmp_path / 'out')
  torch.set_num_threads(1)
  model = AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', dtype=torch.float32, attn_implementation='eager'
  )
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64))
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
  for source in ('run', 'out'):
    difference = np.abs(logits_of(tmp_path / source, tokens, tmp_path) - theirs).max()
    print(f'{source}: the largest difference is {difference:.2e}, of {theirs.std():.2f}')
    assert difference < 1e-4 and theirs.std() > 0.1


@SLOW
# transformers does not have openPangu.
@pytest.mark.parametrize('kind', [kind for kind in FAMILIES if kind != 'pangu_ultra_moe'])
def test_transformers_reads_what_is_written_for_every_family(kind: str, tmp_path: Path) -> None:
  """With every feature of its tiny preset, from a config.json of our own."""
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  config, arrays = random_model(kind, 'F32')
  source = written(tmp_path / 'm', arrays, config)
  tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.float32, attn_implementation='eager'
  )
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
  ours = logits_of(source, tokens, tmp_path)
  assert np.abs(ours - theirs).max() < 1e-4 * theirs.std() and theirs.std() > 0.01
