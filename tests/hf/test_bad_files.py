"""Bad files of a model: every command ends with one message and status 2, and leaves nothing."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.data.tokenizer import load_tokenizer
from tests.hf.commands import Evil, run
from tests.support.published_models import Arrays, arrays_in, copied, edited, written

pytestmark = pytest.mark.usefixtures('cheap_programs')


def drop(directory: Path) -> None:
  arrays = arrays_in(directory)
  del arrays['model.layers.1.block_sparse_moe.experts.3.w2.weight']
  rewritten(directory, arrays)


def add(directory: Path) -> None:
  more = {'model.layers.2.input_layernorm.weight': np.ones(24, np.float32)}
  rewritten(directory, arrays_in(directory) | more)


def reshape(directory: Path) -> None:
  rewritten(directory, arrays_in(directory) | {'model.norm.weight': np.ones(25, np.float32)})


def rewritten(directory: Path, arrays: Arrays) -> None:
  config = json.loads((directory / 'config.json').read_text())
  shutil.rmtree(directory)
  written(directory, arrays, config)


def truncate(directory: Path) -> None:
  path = directory / 'model-00002-of-00002.safetensors'
  path.write_bytes(path.read_bytes()[:-3])


def leave(directory: Path) -> None:
  index = json.loads((directory / 'model.safetensors.index.json').read_text())
  index['weight_map']['model.norm.weight'] = '../elsewhere.safetensors'
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))


def pickled(directory: Path) -> None:
  for path in directory.glob('*.safetensors*'):
    path.unlink()
  (directory / 'pytorch_model.bin').write_bytes(pickle.dumps(Evil()))


def large_tokenizer(directory: Path) -> None:
  load_tokenizer('bytes').save(directory / 'tokenizer.json')


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
  'unknown family': (
    lambda d: edited(d, 'config.json', model_type='mamba'),
    "model_type='mamba' is not known here",
  ),
  'no family': (
    lambda d: edited(d, 'config.json', model_type=None),
    'config.json: model_type=None is not known',
  ),
  'missing key': (
    lambda d: edited(d, 'config.json', num_local_experts=None),
    'num_local_experts is missing',
  ),
  'contradiction': (
    lambda d: edited(d, 'config.json', num_experts_per_tok=7),
    'config.json: num_experts_per_tok=7: use 1 to num_local_experts=6',
  ),
  'another size': (
    lambda d: edited(d, 'config.json', num_hidden_layers=3),
    'tensors missing: model.layers.2.block_sparse_moe.experts.0.w1.weight (14, 24)',
  ),
  'missing': (
    drop,
    '1 tensors missing: model.layers.1.block_sparse_moe.experts.3.w2.weight (24, 14)',
  ),
  'extra': (
    add,
    '1 tensors extra: model.layers.2.input_layernorm.weight (24,) in model.safetensors',
  ),
  'shape': (reshape, 'model.norm.weight: expected (24,), found (25,) in model.safetensors'),
  'truncated': (truncate, 'model-00002-of-00002.safetensors: expected '),
  'outside': (leave, "expected files inside it only, found '../elsewhere.safetensors'"),
  'pickle': (pickled, 'pickles: pytorch_model.bin'),
  'tokenizer': (
    large_tokenizer,
    'tokenizer.json: expected ids below vocab_size=80 of config.json, found 256',
  ),
  'no tokenizer': (lambda d: (d / 'tokenizer.json').write_text('{}'), 'is not a tokenizer.json'),
  'JSON': (lambda d: (d / 'config.json').write_text('{'), 'config.json: expected JSON'),
  'nothing': (lambda d: shutil.rmtree(d), 'holds no config.json'),
}


@pytest.mark.parametrize('bad', BAD)
def test_bad_files_are_one_message_and_leave_nothing(
  bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  monkeypatch.chdir(tmp_path)
  spoil, message = BAD[bad]
  spoil(copied('mixtral', tmp_path / 'm'))
  np.save('ids.npy', np.zeros((1, 2), int))
  before = {*tmp_path.rglob('*')}
  for command in (
    ['import', 'm', '--out=x'],
    ['show', 'm'],
    ['logits', '--model=m', '--tokens=ids.npy', '--out=x'],
  ):
    if 'tokenizer' not in bad or command[0] != 'logits':
      assert run(*command) == 2
      said = capfd.readouterr()
      assert message in said.err.replace('\n', ' '), said.err
      assert 'Traceback' not in said.err and not said.out, said.err
  assert {*tmp_path.rglob('*')} == before
