"""The commands: an import is a run, an export is what was imported, bad input is one message and leaves nothing."""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import generate
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.manifest import digests
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError, check
from moejax.data.sources import DataConfig
from moejax.data.tokenizer import load_tokenizer
from moejax.families import FAMILIES
from moejax.hf import import_model
from moejax.hf import logits as opened
from moejax.hf.__main__ import main
from moejax.hf.safetensors.directory import Tensors, open_tensors
from moejax.model.config import ModelConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.train.experiment import run_dir
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.initial_model import model_and_router_shapes
from moejax.train.experiment.run_dir import CHECKPOINTS, read_config, write_config
from moejax.train.optimizer import OptimConfig
from moejax.train.step.train_state import init_state
from moejax.train.trainer import train
from tests.support.published_models import (
  GOLDEN,
  NAMES,
  Arrays,
  arrays_in,
  copied,
  edited,
  random_model,
  written,
)
from tests.support.quick import QUICK

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
Result = subprocess.CompletedProcess


@pytest.fixture(autouse=True)
def cheap_programs(monkeypatch: pytest.MonkeyPatch) -> None:
  """Logits are run once or twice."""
  monkeypatch.setattr(
    opened, 'whole_row_logits', jax.jit(opened.whole_row_logits.__wrapped__, compiler_options=QUICK)
  )


def run(*args: object) -> int:
  return main([str(arg) for arg in args])


def imported(source: Path, out: Path) -> Path:
  assert run('import', source, f'--out={out}') == 0
  return out


def assert_same_files(one: Path, other: Path) -> None:
  """Every tensor to the byte, and every key of every JSON file that is not of the shards."""
  a, b = open_tensors(one), open_tensors(other)
  assert {*a.names} == {*b.names}
  for name in a.names:
    assert (a.dtype(name), a.read(name).tobytes()) == (b.dtype(name), b.read(name).tobytes()), name
  for name in ('config.json', 'generation_config.json'):
    assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


def with_text(directory: Path, **changes: object) -> Path:
  """A random model of bytes, with their tokenizer."""
  config, arrays = random_model('deepseek_v3', 'BF16', vocab_size=260, **changes)
  written(directory, arrays, config)
  load_tokenizer('bytes').save(directory / 'tokenizer.json')
  (directory / 'generation_config.json').write_text('{"eos_token_id": 2, "top_p": 0.9}')
  return directory


# ---- both ways


@pytest.mark.parametrize(
  'name', ['mixtral', *(pytest.param(n, marks=SLOW) for n in NAMES if n != 'mixtral')]
)
def test_what_is_imported_is_exported(
  name: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
  source = copied(name, tmp_path / 'source')
  before = digests({key: jnp.asarray(a) for key, a in arrays_in(source).items()})
  imported(source, tmp_path / 'run')
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "back"}') == 0
  assert_same_files(source, tmp_path / 'back')
  assert {*os.listdir(tmp_path)} == {'source', 'run', 'back'}, 'nothing temporary stays'
  assert {*os.listdir(tmp_path / 'run')} == {'checkpoints', 'config.json', 'huggingface.json'}
  assert before == digests({key: jnp.asarray(a) for key, a in arrays_in(source).items()})
  said = capfd.readouterr().err
  assert 'imported ' in said and 'exported step 0 of ' in said and said.count('peak memory ') == 2


@pytest.mark.slow
def test_an_import_is_a_run(tmp_path: Path) -> None:
  """At step 0, with config, vocabulary, tokenizer, router bias of all layers and a momentum of zeros."""
  source = with_text(tmp_path / 'source', num_layers=3, mtp_depth=0)
  cfg, tokenizer, step, model, bias = run_dir.open_run(str(imported(source, tmp_path / 'run')))
  assert step == 0 and cfg.model.vocab_size == 260 and tokenizer.vocab_size == 257
  assert cfg.workdir == str(tmp_path / 'run') and cfg.data.tokenizer == str(
    tmp_path / 'run' / 'tokenizer.json'
  )
  arrays = arrays_in(source)
  want = [arrays[f'model.layers.{layer}.mlp.gate.e_score_correction_bias'] for layer in (1, 2)]
  np.testing.assert_array_equal(bias, np.stack(want).astype(np.float32))
  np.testing.assert_array_equal(
    model.blocks.moe.experts.down[...][1, 5],
    arrays['model.layers.2.mlp.experts.5.down_proj.weight'].astype(np.float32).T,
  )
  _, _, router = run_dir.read_model(str(tmp_path / 'run'), cfg, model_and_router_shapes(cfg))
  assert not router.momentum.any() and router.momentum.shape == bias.shape
  # Another config, of all that has no shape.
  other = dataclasses.replace(
    cfg,
    seed=5,
    optim=OptimConfig(learning_rate=0.1),
    model=dataclasses.replace(
      cfg.model,
      dtype='bfloat16',
      remat='full',
      norm_eps=1e-5,
      moe=dataclasses.replace(cfg.model.moe, dispatch=DispatchConfig('dense_matmul')),
    ),
  )
  _, model, _ = run_dir.read_model(str(tmp_path / 'run'), other, model_and_router_shapes(other))
  assert model.cfg == other.model
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "back"}') == 0
  assert_same_files(source, tmp_path / 'back')
  assert (tmp_path / 'back' / 'tokenizer.json').read_bytes() == (
    source / 'tokenizer.json'
  ).read_bytes()


@SLOW
def test_training_starts_from_an_import_and_generate_runs_on_it(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  source = imported(with_text(tmp_path / 'source'), tmp_path / 'run')
  assert generate.main([f'--workdir={source}', '--prompt=ab', '--max_tokens=4']) == 0
  assert capsys.readouterr().out.startswith('ab')
  model = read_config(str(source)).model
  cfg = ExperimentConfig(
    steps=2,
    batch_size=8,
    seq_len=32,
    workdir=str(tmp_path / 'trained'),
    init_from=str(source),
    model=model,
    data=DataConfig(
      'synthetic',
      tokenizer=str(source / 'tokenizer.json'),
      cache_dir=str(tmp_path / 'cache'),
      synthetic_tokens=20_000,
    ),
    optim=OptimConfig(learning_rate=1e-20),
  )
  assert train(cfg) == 0
  # At that rate nothing moves but the bias, which keeps its float32.
  assert (
    run(
      'export', f'--workdir={tmp_path / "trained"}', f'--out={tmp_path / "out"}', '--dtype=bfloat16'
    )
    == 0
  )
  ours, theirs = arrays_in(tmp_path / 'out'), arrays_in(tmp_path / 'source')
  assert ours.keys() - theirs.keys() == {
    'model.layers.3.embed_tokens.weight',
    'model.layers.3.shared_head.head.weight',
  }
  moved = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
  assert moved and all(
    name.endswith('e_score_correction_bias') and ours[name].dtype == np.float32 for name in moved
  )
  capsys.readouterr()
  assert (
    train(dataclasses.replace(cfg, workdir=str(tmp_path / 'x'), init_from=str(tmp_path / 'source')))
    == 2
  )
  assert 'import it with `python -m moejax.hf import' in capsys.readouterr().err


def trained_here(path: Path, kind: str, **changes: object) -> tuple[ModelConfig, dict[str, object]]:
  """A run directory as the trainer leaves it, without the training: numbers are random."""
  cfg = ExperimentConfig(
    workdir=str(path),
    data=DataConfig(tokenizer='bytes'),
    model=dataclasses.replace(FAMILIES[kind].presets['tiny'], vocab_size=0, **changes),
  )
  write_config(cfg)
  tokenizer = load_tokenizer('bytes')
  tokenizer.save(path / 'tokenizer.json')
  full = dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, vocab_size=tokenizer.vocab_size)
  )
  shapes, rng = jax.eval_shape(functools.partial(init_state, full)), np.random.default_rng(0)
  state = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)),
    {'model': shapes.model, 'router': shapes.router},
  )
  writer = Checkpoints(path / CHECKPOINTS, CheckpointConfig())
  writer.save(3, state, {})
  writer.close()
  return full.model, state


@pytest.mark.slow
def test_a_run_is_exported_in_float32_and_comes_back_to_the_bit(tmp_path: Path) -> None:
  """As the only family that can hold it, with its tokenizer and the ids of it."""
  model, state = trained_here(tmp_path / 'run', 'deepseek_v3', num_layers=2, mtp_depth=0)
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}') == 0
  source = opened.open_published(tmp_path / 'out')
  assert source.cfg == dataclasses.replace(model, init=source.cfg.init)
  back, bias = opened.read_published_model(source, opened.ONE_DEVICE)
  assert digests(back) == digests(state['model'])
  np.testing.assert_array_equal(bias, state['router'].bias)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (
    config['torch_dtype'] == 'float32'
    and config['eos_token_id'] == 256
    and config['vocab_size'] == 257
  )
  assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == {
    'bos_token_id': 256,
    'eos_token_id': 256,
  }
  assert load_tokenizer(str(tmp_path / 'out' / 'tokenizer.json')).vocab_size == 257


def test_a_bias_that_files_cannot_hold_is_not_left_out(
  tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
  trained_here(tmp_path / 'run', 'mixtral')
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}') == 2
  assert 'router.bias is not zero' in capfd.readouterr().err and {*os.listdir(tmp_path)} == {'run'}


# ---- logits and show


@pytest.mark.parametrize(
  'name', ['mixtral', *(pytest.param(n, marks=SLOW) for n in NAMES if n != 'mixtral')]
)
def test_logits_are_those_of_the_golden_of_files_and_of_a_run(name: str, tmp_path: Path) -> None:
  source, golden = copied(name, tmp_path / 'source'), np.load(GOLDEN / name / 'golden.npz')
  np.save(tmp_path / 'ids.npy', golden['tokens'].astype(np.uint16))
  for model in (source, imported(source, tmp_path / 'run')):
    assert (
      run(
        'logits',
        f'--model={model}',
        f'--tokens={tmp_path / "ids.npy"}',
        f'--out={tmp_path / "out.npy"}',
      )
      == 0
    )
    logits = np.load(tmp_path / 'out.npy')
    assert logits.dtype == np.float32 and np.abs(logits - golden['logits']).max() < 1e-4
  assert {*os.listdir(tmp_path)} == {'source', 'run', 'ids.npy', 'out.npy'}


def test_show_tells_what_it_is_and_reads_no_tensor(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.setattr(Tensors, 'read', lambda *args: pytest.fail('a tensor is read'))
  monkeypatch.setenv('COLUMNS', '200')
  assert run('show', with_text(tmp_path / 'm')) == 0
  shown = capsys.readouterr().out
  stored = open_tensors(tmp_path / 'm')
  sizes = {name: np.prod(stored.shape(name)) for name in stored.names if 'correction' not in name}
  ahead = sum(size for name, size in sizes.items() if '.layers.3.' in name)
  for part in (
    'deepseek_v3',
    f'{sum(sizes.values()) - ahead:,}, ',
    f'{ahead:,} more',
    f'{len(stored.names)} BF16',
    '257 tokens',
    'attention.latent.kv_rank',
  ):
    assert part in shown, part


# ---- bad input: one message, status 2, nothing left behind


def drop(directory: Path) -> None:
  arrays = arrays_in(directory)
  del arrays['model.layers.1.block_sparse_moe.experts.3.w2.weight']
  rewritten(directory, arrays)


def add(directory: Path) -> None:
  rewritten(
    directory,
    arrays_in(directory) | {'model.layers.2.input_layernorm.weight': np.ones(24, np.float32)},
  )


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


class Evil:
  """Unpickled, it would leave a file."""

  def __reduce__(self) -> tuple[Callable, tuple[str]]:
    return os.system, ('touch unpickled',)


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
      assert (
        message in said.err.replace('\n', ' ') and 'Traceback' not in said.err and not said.out
      ), said.err
  assert {*tmp_path.rglob('*')} == before


IDS = {
  'floats': (np.zeros((2, 3)), 'expected whole numbers [B, S], one or more, found float64 [2, 3]'),
  'one axis': (np.zeros(3, int), 'found int64 [3]'),
  'none': (np.zeros((0, 3), int), 'found int64 [0, 3]'),
  'too large': (
    np.array([[0, 79], [5, 80]]),
    'expected ids from 0 to 79, found 80 in row 1, column 1',
  ),
  'far too large': (np.array([[2**63]], np.uint64), f'found {2**63} in row 0, column 0'),
  'negative': (np.array([[0, -1]]), 'found -1 in row 0, column 1'),
  'objects': (np.array([[Evil()]], object), 'ids.npy: expected a .npy of token ids, found '),
}


@pytest.mark.parametrize('bad', [*IDS, 'archive', 'text', 'missing'])
def test_bad_ids_are_one_message_and_leave_nothing(
  bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  monkeypatch.chdir(tmp_path)
  message = 'ids.npy: expected '
  if bad in IDS:
    ids, message = IDS[bad]
    np.save('ids.npy', ids)
  elif bad == 'archive':
    np.savez('ids.npz', a=np.zeros((1, 1), int))
    Path('ids.npz').rename('ids.npy')
  elif bad == 'text':
    Path('ids.npy').write_text('1 2 3')
  before = {*tmp_path.rglob('*')}
  assert run('logits', f'--model={GOLDEN / "mixtral"}', '--tokens=ids.npy', '--out=x.npy') == 2
  said = capfd.readouterr()
  assert message in said.err and 'Traceback' not in said.err and {*tmp_path.rglob('*')} == before


def test_what_is_there_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('mine')
  imported(GOLDEN / 'llama', tmp_path / 'run')
  for args in (['import', GOLDEN / 'llama'], ['export', f'--workdir={tmp_path / "run"}']):
    assert run(*args, f'--out={tmp_path / "full"}') == 2
    assert 'is there and not empty' in capfd.readouterr().err
  assert {*os.listdir(tmp_path)} == {'full', 'run'} and os.listdir(tmp_path / 'full') == ['file']
  (tmp_path / 'empty').mkdir()
  imported(GOLDEN / 'llama', tmp_path / 'empty')


@pytest.mark.parametrize('where', ['a read', 'the save', 'the last file'])
def test_an_import_that_breaks_off_leaves_nothing(
  where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  def fail(kind: type[Exception]) -> Callable:
    def failing(*args: object, **kwargs: object) -> None:
      raise kind('no more')

    return failing

  if where == 'a read':
    monkeypatch.setattr(Tensors, 'read', fail(ConfigError))
  elif where == 'the save':
    monkeypatch.setattr(Checkpoints, 'save', fail(SaveFailed))
  else:
    monkeypatch.setattr(import_model, 'origin_of', fail(OSError))
  assert run('import', GOLDEN / 'llama', f'--out={tmp_path / "run"}') == 2
  assert capfd.readouterr().err.endswith('moejax.hf: no more\n') and not os.listdir(tmp_path)


def test_logits_that_break_off_leave_nothing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(opened, 'whole_row_logits', lambda *args: check('no more'))
  np.save(tmp_path / 'ids.npy', np.zeros((1, 2), int))
  monkeypatch.chdir(tmp_path)
  assert run('logits', f'--model={GOLDEN / "llama"}', '--tokens=ids.npy', '--out=x.npy') == 2
  assert os.listdir(tmp_path) == ['ids.npy']


def test_what_a_killed_import_left_does_not_disturb_the_next(tmp_path: Path) -> None:
  (tmp_path / 'run.moejax-partial' / 'checkpoints' / '0').mkdir(parents=True)
  (tmp_path / 'run.moejax-partial' / 'checkpoints' / '0' / 'rubbish').write_text('')
  imported(GOLDEN / 'llama', tmp_path / 'run')
  assert os.listdir(tmp_path) == ['run'] and not [*tmp_path.rglob('rubbish')]


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


# ---- others' readers


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
  assert run('export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}') == 0
  torch.set_num_threads(1)
  model = AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', dtype=torch.float32, attn_implementation='eager'
  )
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64))
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
  np.save(tmp_path / 'ids.npy', tokens)
  for source in ('run', 'out'):
    assert (
      run(
        'logits',
        f'--model={tmp_path / source}',
        f'--tokens={tmp_path / "ids.npy"}',
        f'--out={tmp_path / "ours.npy"}',
      )
      == 0
    )
    ours = np.load(tmp_path / 'ours.npy')
    print(
      f'{source}: the largest difference of logits is {np.abs(ours - theirs).max():.2e}, of {theirs.std():.2f}'
    )
    assert np.abs(ours - theirs).max() < 1e-4 and theirs.std() > 0.1


@SLOW
@pytest.mark.parametrize(
  'kind', [kind for kind in FAMILIES if kind != 'pangu_ultra_moe']
)  # which it does not have
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
  np.save(tmp_path / 'ids.npy', tokens)
  assert (
    run(
      'logits',
      f'--model={source}',
      f'--tokens={tmp_path / "ids.npy"}',
      f'--out={tmp_path / "ours.npy"}',
    )
    == 0
  )
  ours = np.load(tmp_path / 'ours.npy')
  assert np.abs(ours - theirs).max() < 1e-4 * theirs.std() and theirs.std() > 0.01
