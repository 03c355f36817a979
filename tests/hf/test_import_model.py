"""An import is a run, what is imported is exported, and nothing is left of one that breaks off."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import generate
from moejax.checkpoint.checkpoints import Checkpoints
from moejax.checkpoint.manifest import digests
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError
from moejax.data.sources import DataConfig
from moejax.hf import import_model
from moejax.hf.safetensors.directory import Tensors
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment import run_dir
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.initial_model import model_and_router_shapes
from moejax.train.experiment.run_dir import read_config
from moejax.train.optimizer import OptimConfig
from moejax.train.trainer import train
from tests.hf.commands import (
  assert_same_files,
  exported,
  imported,
  logits_of,
  run,
  with_text,
)
from tests.support.published_models import (
  GOLDEN,
  NAMES,
  arrays_in,
  copied,
  random_model,
  written,
)
from tests.support.unoptimised import unoptimised

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  'name', ['mixtral', *(pytest.param(n, marks=SLOW) for n in NAMES if n != 'mixtral')]
)
def test_what_is_imported_is_exported(
  name: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  source = copied(name, tmp_path / 'source')
  before = digests({key: jnp.asarray(a) for key, a in arrays_in(source).items()})
  # A shell leaves these ~ to the command; what is read of the run includes how its files lay.
  imported(source, Path('~/run'))
  exported(Path('~/run'), Path('~/back'))
  assert_same_files(source, tmp_path / 'back')
  assert {*os.listdir(tmp_path)} == {'source', 'run', 'back'}, 'nothing temporary stays'
  assert {*os.listdir(tmp_path / 'run')} == {'checkpoints', 'config.json', 'huggingface.json'}
  assert before == digests({key: jnp.asarray(a) for key, a in arrays_in(source).items()})
  said = capfd.readouterr().err
  assert 'imported ' in said and 'exported step 0 of ' in said and said.count('peak memory ') == 2


@pytest.mark.slow
def test_an_import_is_a_run(tmp_path: Path) -> None:
  """At step 0, with config, tokenizer, router bias of all layers and a momentum of zeros."""
  source = with_text(tmp_path / 'source', num_layers=3, mtp_depth=0)
  cfg, tokenizer, step, model, bias = run_dir.open_run(str(imported(source, tmp_path / 'run')))
  assert step == 0 and cfg.model.vocab_size == 260 and tokenizer.vocab_size == 257
  assert cfg.workdir == str(tmp_path / 'run')
  assert cfg.data.tokenizer == str(tmp_path / 'run' / 'tokenizer.json')
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
  moe = dataclasses.replace(cfg.model.moe, dispatch=DispatchConfig('dense_matmul'))
  changes = {'dtype': 'bfloat16', 'remat': 'full', 'norm_eps': 1e-5, 'moe': moe}
  other = dataclasses.replace(
    cfg,
    seed=5,
    optim=OptimConfig(learning_rate=0.1),
    model=dataclasses.replace(cfg.model, **changes),
  )
  _, model, _ = run_dir.read_model(str(tmp_path / 'run'), other, model_and_router_shapes(other))
  assert model.cfg == other.model
  back = exported(tmp_path / 'run', tmp_path / 'back')
  assert_same_files(source, back)
  assert (back / 'tokenizer.json').read_bytes() == (source / 'tokenizer.json').read_bytes()


@SLOW
def test_an_import_in_bfloat16_is_the_same_model_in_half_the_room(
  tmp_path: Path, cheap_programs: None
) -> None:
  """Of files in bfloat16; what computes keeps it, what trains from it gets float32."""
  # One layer is quick to compile; biases, norms of heads and a shared expert are in it.
  config, arrays = random_model('glm4_moe', 'BF16', num_layers=1, num_dense_layers=0, mtp_depth=0)
  source = written(tmp_path / 'source', arrays, config)
  (source / 'generation_config.json').write_text('{"eos_token_id": 2}')
  for name in ('float32', 'bfloat16'):
    imported(source, tmp_path / name, f'--dtype={name}')
  tokens = np.random.default_rng(0).integers(0, 96, (1, 9))
  wide, half = (logits_of(tmp_path / name, tokens, tmp_path) for name in ('float32', 'bfloat16'))
  np.testing.assert_array_equal(wide, half)
  run_of_half = run_dir.open_run(str(tmp_path / 'bfloat16'))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(run_of_half.model)} == {'bfloat16'}
  assert run_of_half.router_bias.dtype == jnp.float32
  both = [
    run_dir.read_model(
      str(tmp_path / name), run_of_half.cfg, model_and_router_shapes(run_of_half.cfg)
    )
    for name in ('float32', 'bfloat16')
  ]
  assert digests(both[0].model) == digests(both[1].model)
  assert_same_files(source, exported(tmp_path / 'bfloat16', tmp_path / 'back'))


@SLOW
def test_training_starts_from_an_import_and_generate_runs_on_it(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  source = imported(with_text(tmp_path / 'source'), tmp_path / 'run')
  with unoptimised():
    assert generate.main([f'--workdir={source}', '--prompt=ab', '--max_tokens=4']) == 0
  assert capsys.readouterr().out.startswith('ab')
  model = read_config(str(source)).model
  cfg = ExperimentConfig(
    steps=2,
    batch_size=8,
    seq_len=32,
    workdir=str(tmp_path / 'trained'),
    init_from=str(source),
    mesh=MeshConfig(data=1),
    model=model,
    data=DataConfig(
      'synthetic',
      tokenizer=str(source / 'tokenizer.json'),
      cache_dir=str(tmp_path / 'cache'),
      synthetic_tokens=20_000,
    ),
    optim=OptimConfig(learning_rate=1e-20),
  )
  with unoptimised():
    assert train(cfg) == 0
  # At that rate nothing moves but the bias, which keeps its float32.
  exported(tmp_path / 'trained', tmp_path / 'out', '--dtype=bfloat16')
  ours, theirs = arrays_in(tmp_path / 'out'), arrays_in(tmp_path / 'source')
  assert ours.keys() == theirs.keys(), 'what the source repeats, and no more'
  moved = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
  assert moved
  for name in moved:
    assert name.endswith('e_score_correction_bias') and ours[name].dtype == np.float32
  capsys.readouterr()
  from_files = {'workdir': str(tmp_path / 'x'), 'init_from': str(tmp_path / 'source')}
  assert train(dataclasses.replace(cfg, **from_files)) == 2
  assert 'import it with `python -m moejax.hf import' in capsys.readouterr().err


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


def test_what_a_killed_import_left_does_not_disturb_the_next(tmp_path: Path) -> None:
  (tmp_path / 'run.moejax-partial' / 'checkpoints' / '0').mkdir(parents=True)
  (tmp_path / 'run.moejax-partial' / 'checkpoints' / '0' / 'rubbish').write_text('')
  imported(GOLDEN / 'llama', tmp_path / 'run')
  assert os.listdir(tmp_path) == ['run'] and not [*tmp_path.rglob('rubbish')]
