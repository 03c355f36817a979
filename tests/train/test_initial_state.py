"""How a run begins: what of another run it takes over, what it says of that, and what it
refuses."""

import dataclasses
from pathlib import Path

import jax
import pytest

from moejax.config import ConfigError
from moejax.data.tokenizer import load_tokenizer
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.run_dir import write_config
from moejax.train.initial_state import (
  differences,
  expect_same_tokenizer,
  read_starting_run,
  replicate_unit_axes,
)
from moejax.train.shapes import sharded_state_shapes
from moejax.train.trainer import train
from tests.support.tiny_run import CONFIG, config, rows

DENSE = {
  'model__moe__router__num_experts': 1,
  'model__moe__router__top_k': 1,
  'model__moe__d_expert': 32,
  'balance__bias_rule': '',
  'balance__losses__sequence': '0',
  'mesh__data': 1,
}


@pytest.fixture(scope='module')
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of one expert a layer, as wide as its dense layer."""
  workdir = tmp_path_factory.mktemp('dense') / 'run'
  assert train(config(workdir, eval__every=0, **DENSE)) == 0
  return workdir


@pytest.mark.slow
def test_a_dense_run_goes_on_as_it_is_and_as_experts(
  dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  """Experts on a mesh that splits them, of which the dense run has one; they are two copies in two
  parts."""
  few = {'init_from': str(dense), 'stop_after': 1, 'eval__every': 0}
  other = {
    'model__moe__dispatch__dispatcher': 'dense_matmul',
    'model__remat': 'full',
    'model__norm_eps': 1.001e-6,
  }
  assert train(config(tmp_path / 'same', **few | DENSE | other)) == 0
  said = ' '.join(capsys.readouterr().err.split())
  assert f'the model of {dense}; model.norm_eps=1.001e-06 here, 1e-06 there' in said
  assert 'remat' not in said and 'dispatch' not in said and 'upcycled' not in said
  assert train(config(tmp_path / 'experts', mesh__expert=4, **few)) == 0
  said = ' '.join(capsys.readouterr().err.split())
  experts_of_ffn = '4 experts are 2 copies of its FFN in 2 parts; routers begin at rand'
  assert f'the model of {dense}, upcycled: {experts_of_ffn}' in said
  assert train(config(tmp_path / 'drop', upcycle__drop=0.5, mesh__data=1, **few)) == 0
  assert '50% of their units are drawn anew' in ' '.join(capsys.readouterr().err.split())
  began, same, experts, drop = (
    rows(run)[0] for run in (dense, *(tmp_path / n for n in ('same', 'experts', 'drop')))
  )
  assert (
    same['lm_loss'] < began['lm_loss'] - 0.1 and same['learning_rate'] == began['learning_rate']
  )
  assert (
    abs(experts['lm_loss'] - same['lm_loss']) < 1e-5 < 1e-4 < abs(drop['lm_loss'] - same['lm_loss'])
  )


@pytest.mark.slow
def test_what_cannot_be_upcycled_names_its_fields(
  dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  assert (
    train(
      config(
        tmp_path / 'run', init_from=str(dense), model__moe__d_expert=12, model__sandwich_norm=True
      )
    )
    == 2
  )
  told = capsys.readouterr().err
  for part in (
    'd_expert=12 does not divide the 32 hidden units',
    'it has other shapes, not only in its FFN',
    'model.sandwich_norm=True here, False there',
    'model.moe.router.num_experts=4 here, 1 there',
  ):
    assert part in told, part


def test_what_differs_is_what_decides_the_result() -> None:
  model = CONFIG.model
  other = dataclasses.replace(
    model,
    d_ff=64,
    dtype='bfloat16',
    remat='full',
    unroll=2,
    moe=dataclasses.replace(model.moe, num_shared=1),
  )
  assert [*differences(other, model)] == [
    'model.d_ff=64 here, 32 there',
    'model.moe.num_shared=1 here, 0 there',
  ]
  assert not [*differences(model, model)]


def test_a_directory_that_is_no_run_is_told_as_init_from(tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match='init_from: .*holds no config.json'):
    read_starting_run(str(tmp_path))
  write_config(config(tmp_path))
  with pytest.raises(ConfigError, match='init_from: .*tokenizer.json'):
    read_starting_run(str(tmp_path))
  write_config(config(tmp_path, model__vocab_size=300))
  assert read_starting_run(str(tmp_path)).cfg.model.vocab_size == 300


def test_another_tokenizer_than_that_of_init_from_is_refused_but_by_name(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  source = config(tmp_path / 'source', model__vocab_size=300)
  write_config(source)
  bpe = load_tokenizer('bpe:260', ['abab'])
  here = config(tmp_path / 'run', init_from=source.workdir)
  expect_same_tokenizer(here, bpe)
  assert 'init_from holds no tokenizer' in caplog.text
  load_tokenizer('bytes').save(tmp_path / 'source' / 'tokenizer.json')
  expect_same_tokenizer(here, load_tokenizer('bytes'))
  with pytest.raises(ConfigError) as error:
    expect_same_tokenizer(here, bpe)
  for part in (
    load_tokenizer('bytes').digest,
    bpe.digest,
    'bpe:260',
    'checkpoint.accept=tokenizer',
  ):
    assert part in str(error.value)
  assert f'--config.data.tokenizer={tmp_path}/source/tokenizer.json' in str(error.value)
  expect_same_tokenizer(
    config(tmp_path / 'run', init_from=source.workdir, checkpoint__accept='tokenizer'), bpe
  )
  assert 'accepted: data.tokenizer' in caplog.text


def test_units_are_dropped_of_a_dense_model_only(tmp_path: Path) -> None:
  with pytest.raises(
    ConfigError, match='upcycle.drop=0.5 is for a dense model: name one with init_from'
  ):
    config(tmp_path, upcycle__drop=0.5)
  assert config(tmp_path, upcycle__drop=0.5, init_from='somewhere').upcycle.drop == 0.5


def test_one_expert_is_on_every_device_of_an_expert_mesh(tmp_path: Path) -> None:
  mesh = make_mesh(MeshConfig(expert=4, fsdp=2))
  cfg = config(tmp_path, model__vocab_size=300, **DENSE)
  with jax.set_mesh(mesh):
    state = sharded_state_shapes(cfg, mesh)
  leaf = jax.tree.leaves(state.model.blocks.moe.experts.gate)[0]
  assert leaf.shape == (1, 1, 32, 32)
  with pytest.raises(ValueError):
    leaf.sharding.shard_shape(leaf.shape)
  assert replicate_unit_axes(leaf).sharding.shard_shape(leaf.shape) == (1, 1, 16, 32)
