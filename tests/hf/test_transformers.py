"""What others read: transformers computes the same logits from the files that we write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from moejax.data.published_tokenizer import published_json, tokenizer_config_json
from moejax.data.tokenizer import load_tokenizer
from moejax.families import FAMILIES, config_json
from moejax.hf.export_model import OWN_RULES
from moejax.train.experiment.run_dir import read_tokenizer
from tests.hf.commands import exported, logits_of, tiny_run
from tests.support.published_models import random_model, written

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures('cheap_programs')


def their_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
  """What transformers makes of token ids [B, S], from published files: [B, S, V]."""
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager'
  )
  with torch.no_grad():
    return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


@SLOW
def test_a_recipe_trains_is_exported_and_transformers_computes_the_same(tmp_path: Path) -> None:
  """DeepSeek-V3's, tiny: logits to 1e-4, from the files alone."""
  pytest.importorskip('transformers')
  command = [
    sys.executable,
    'train.py',
    '--config=configs/deepseek_v3.py:tiny',
    '--config.steps=20',
    '--config.eval.every=0',
    f'--config.workdir={tmp_path / "run"}',
  ]
  subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {'XLA_FLAGS': ''})
  out = exported(tmp_path / 'run', tmp_path / 'out')
  vocab_size = json.loads((out / 'config.json').read_text())['vocab_size']
  tokens = np.random.default_rng(0).integers(0, vocab_size, (2, 64))
  theirs = their_logits(out, tokens)
  for source in ('run', 'out'):
    difference = np.abs(logits_of(tmp_path / source, tokens, tmp_path) - theirs).max()
    print(f'{source}: the largest difference is {difference:.2e}, of {theirs.std():.2f}')
    assert difference < 1e-4 and theirs.std() > 0.1


def test_the_run_of_make_train_is_read_by_transformers(tmp_path: Path) -> None:
  """Of configs/tiny.py, small: the logits of AutoModelForCausalLM, the ids of AutoTokenizer."""
  out = exported(tiny_run(tmp_path / 'run'), tmp_path / 'out')
  tokens = np.random.default_rng(0).integers(0, 257, (2, 24))
  theirs = their_logits(out, tokens)
  assert np.abs(logits_of(out, tokens, tmp_path) - theirs).max() < 1e-4 * theirs.std()
  assert theirs.std() > 0.1
  check_ids(out, 'glm4_moe')


def check_ids(directory: Path, kind: str) -> None:
  """AutoTokenizer gives the ids of ours, from the files of an export alone."""
  transformers = pytest.importorskip('transformers')
  name = 'PreTrainedTokenizerFast' if kind in OWN_RULES else 'AutoTokenizer'
  theirs = getattr(transformers, name).from_pretrained(directory)
  ours = read_tokenizer(directory)
  text = "the cat sat 2023, it's 3.14\n\tété 火"
  # What lies in an export is a published model; its opening is what a prompt has.
  assert theirs.encode(text) == ours.encode_prompt(text)
  assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
  assert theirs.eos_token_id == ours.eod_id and theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize('kind', [kind for kind in FAMILIES if kind != 'pangu_ultra_moe'])
def test_transformers_tokenizes_an_export_of_every_family_as_we_do(
  kind: str, tmp_path: Path
) -> None:
  """Of a run of our own, whose documents and prompts eod opens, with a BPE trained here."""
  tokenizer = load_tokenizer('bpe:300', ['the cat sat 2023 and 1999, it was 3.14\n'] * 9)
  config = config_json(FAMILIES[kind], FAMILIES[kind].presets['tiny'], {'eos_token_id': 0})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'tokenizer.json').write_text(published_json(tokenizer))
  (tmp_path / 'tokenizer_config.json').write_text(tokenizer_config_json(tokenizer, 64))
  check_ids(tmp_path, kind)
  assert read_tokenizer(tmp_path).encode_prompt('a') == tokenizer.encode_prompt('a')


@pytest.mark.parametrize('kind', [kind for kind in FAMILIES if kind != 'pangu_ultra_moe'])
@pytest.mark.parametrize('template', ['<s> $A', ''], ids=['bos', 'nothing'])
def test_transformers_tokenizes_an_imported_model_as_we_do(
  kind: str, template: str, tmp_path: Path
) -> None:
  """With bos where its tokenizer.json has it; no tokenizer_config.json came with the model."""
  backend = tokenizers.Tokenizer.from_str(
    load_tokenizer('bpe:300', ['the cat sat 2023 and 1999\n'] * 9).json_text
  )
  backend.add_special_tokens(['<s>', '</s>'])
  ids = {name: backend.token_to_id(name) for name in ('<s>', '</s>')}
  if template:
    backend.post_processor = processors.TemplateProcessing(
      single=template, special_tokens=[*ids.items()][:1]
    )
  said = {'bos_token_id': ids['<s>'], 'eos_token_id': ids['</s>']}
  config = config_json(FAMILIES[kind], FAMILIES[kind].presets['tiny'], said)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  backend.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(
    tokenizer_config_json(read_tokenizer(tmp_path), 64)
  )
  check_ids(tmp_path, kind)


@SLOW
# transformers does not have openPangu.
@pytest.mark.parametrize('kind', [kind for kind in FAMILIES if kind != 'pangu_ultra_moe'])
def test_transformers_reads_what_is_written_for_every_family(kind: str, tmp_path: Path) -> None:
  """With every feature of its tiny preset, from a config.json of our own."""
  config, arrays = random_model(kind, 'F32')
  source = written(tmp_path / 'm', arrays, config)
  tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
  theirs = their_logits(source, tokens)
  ours = logits_of(source, tokens, tmp_path)
  assert np.abs(ours - theirs).max() < 1e-4 * theirs.std() and theirs.std() > 0.01
