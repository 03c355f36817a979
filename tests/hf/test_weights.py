"""Published tensors to parameters and back: to the byte, on every mesh, a layer at a time, and only where files fit."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES
from moejax.hf import weights as transfer
from moejax.hf.export_model import ExportPlan, Origin, origin_of, plan_export
from moejax.hf.import_model import run_config
from moejax.hf.safetensors.directory import Tensors
from moejax.hf.safetensors.file import DTYPES, Spec
from moejax.hf.weights import Published, lost, open_published, read_weights, tensor_specs
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.sharding.tree import flatten
from moejax.train.experiment.config import ExperimentConfig
from tests.support.published_models import (
  GOLDEN,
  NAMES,
  arrays_in,
  copied,
  edited,
  random_model,
  written,
)

MESH = MeshConfig(data=2, fsdp=2, expert=2)


def loaded(source: Published, mesh: MeshConfig | None = None) -> dict[str, jax.Array]:
  """Path -> leaf; on one device unless there is a mesh."""
  devices = make_mesh(mesh) if mesh else make_mesh(MeshConfig(data=1), jax.devices()[:1])
  model, bias = read_weights(source, devices, lambda count: None)
  assert isinstance(model, Transformer) and model.cfg == source.cfg
  return dict(zip(source.made_of, [*flatten(model).values(), bias], strict=True))


def given_back(
  source: Published, leaves: dict[str, jax.Array], dtype: str = ''
) -> tuple[ExportPlan, list[Spec]]:
  """What an export of the import would write."""
  origin = Origin(**json.loads(json.dumps(origin_of(source)._asdict())))
  how = plan_export(run_config(source.cfg, 'run'), origin, -1, '', dtype)
  views = {path: np.asarray(leaf) for path, leaf in leaves.items()}
  assert not lost(how.known, how.config, how.made_of, views)
  return how, tensor_specs(how.made_of, views, how.copies, how.dtypes)


# ---- both ways


@pytest.mark.parametrize('name', NAMES)
def test_a_golden_comes_back_to_the_byte(name: str, tmp_path: Path) -> None:
  source = open_published(copied(name, tmp_path / name))
  how, back = given_back(source, loaded(source))
  assert {spec.name for spec in back} == {*source.tensors.names}
  for spec in back:
    assert (spec.dtype, spec.shape) == (
      source.tensors.dtype(spec.name),
      source.tensors.shape(spec.name),
    )
    assert spec.load().tobytes() == source.tensors.read(spec.name).tobytes(), spec.name
  assert how.config == json.loads((GOLDEN / name / 'config.json').read_text())
  assert how.generation_config == json.loads((GOLDEN / name / 'generation_config.json').read_text())
  assert len(source.copies) == 2 * source.cfg.mtp_depth
  layers = [int(spec.name.split('.')[2]) for spec in back if '.layers.' in spec.name]
  assert layers == sorted(layers), 'a shard has whole layers'


@pytest.mark.parametrize('name', ['deepseek_v3', 'openpangu_ultra_moe'])
def test_the_other_spelling_is_the_same_model_and_is_given_back(name: str, tmp_path: Path) -> None:
  one, other = (
    open_published(copied(name, tmp_path / file, file))
    for file in ('config.json', 'config_hub.json')
  )
  assert one.cfg == other.cfg and one.made_of == other.made_of and one.config != other.config
  assert (
    plan_export(run_config(other.cfg, 'run'), origin_of(other), -1, '', '').config == other.config
  )


@pytest.mark.parametrize(
  'name',
  [
    'mixtral',
    'gpt_oss',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in NAMES
      if name not in ('mixtral', 'gpt_oss')
    ),
  ],
)
def test_a_mesh_and_layers_make_the_same_leaves(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """On the shardings of the mesh, and read by their parts: nothing twice for two devices that hold the same."""
  source = open_published(copied(name, tmp_path / name))
  want = loaded(source)
  pieces: list[np.ndarray] = []
  read = Tensors.read
  monkeypatch.setattr(
    Tensors, 'read', lambda self, *args: pieces.append(read(self, *args)) or pieces[-1]
  )
  monkeypatch.setattr(transfer, 'SMALL', 0)
  mesh = MESH if name != 'llama' else MeshConfig(data=4, fsdp=2)  # one expert
  got = loaded(source, mesh)
  shapes = jax.eval_shape(lambda key: Transformer(key, source.cfg), jax.random.key(0))
  homes = jax.tree.leaves(shardings(shapes, make_mesh(mesh)))
  for (path, leaf), home in zip(got.items(), [*homes, got['router.bias'].sharding]):
    assert leaf.sharding == home and leaf.dtype == np.float32, path
    assert np.asarray(leaf).tobytes() == np.asarray(want[path]).tobytes(), path
  # What gate and up share is read by each; what is there twice is compared.
  once = sum(4 * int(np.prod(part.shape)) for parts in source.made_of.values() for part in parts)
  twice = sum(
    4 * int(np.prod(source.tensors.shape(name))) for pair in source.copies.items() for name in pair
  )
  assert sum(piece.nbytes for piece in pieces) == once + twice


def test_a_stack_is_never_whole_in_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """At most a layer in the dtype of the file, and one tensor of it; progress adds up to all bytes."""
  config, arrays = random_model('mixtral', 'BF16', num_layers=6)
  source, sizes, done = open_published(written(tmp_path / 'm', arrays, config)), [], []
  assembled = transfer._assembled
  monkeypatch.setattr(transfer, 'SMALL', 0)
  monkeypatch.setattr(
    transfer, '_assembled', lambda *args: sizes.append(assembled(*args)) or sizes[-1]
  )
  read_weights(source, make_mesh(MeshConfig(data=1), jax.devices()[:1]), done.append)
  largest = {
    path: max(2 * np.prod(arrays[part.name].shape) for part in parts)
    for path, parts in source.made_of.items()
    if parts
  }
  experts = 4
  assert (
    max(array.nbytes for array in sizes if array.ndim > 2)
    == experts * largest['blocks.moe.experts.gate']
  )
  assert all(array.dtype == ml_dtypes.bfloat16 for array in sizes if array.ndim > 2)
  assert sum(done) == source.nbytes == sum(array.nbytes for array in arrays.values())


def test_every_bit_of_every_dtype_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Numbers too small for many a processor among them; in dtypes mixed within a layer and within a stack."""
  monkeypatch.setattr(transfer, 'SMALL', 0)
  config, arrays = random_model('mixtral', 'BF16', vocab_size=2048)
  bits = np.arange(1 << 16, dtype=np.uint16)
  for k, (name, kind) in enumerate(
    (f'model.layers.0.block_sparse_moe.experts.0.w{w}.weight', kind)
    for w, kind in ((1, 'BF16'), (2, 'F16'), (3, 'BF16'))
  ):
    numbers = bits.view(DTYPES[kind])
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    arrays[name] = np.resize(np.roll(numbers, -k * 777), arrays[name].shape)
  table = bits.view(ml_dtypes.bfloat16)
  arrays['model.embed_tokens.weight'] = np.where(
    np.isfinite(table.astype(np.float32)), table, 0
  ).reshape(2048, 32)
  tiny = np.array([1, 2**31 + 1, 2**23 - 1, 2**23], np.uint32).view(np.float32)
  arrays['model.norm.weight'] = np.resize(tiny, 32)
  # With nothing but bfloat16 in its stack, the first numbers above zero, which the mesh casts.
  arrays['model.layers.1.self_attn.q_proj.weight'].reshape(-1)[:256] = bits[:256].view(
    ml_dtypes.bfloat16
  )
  source = open_published(written(tmp_path / 'm', arrays, config))
  how, back = given_back(source, loaded(source))
  for spec in back:
    assert (
      spec.load().tobytes() == arrays[spec.name].tobytes()
      and spec.load().dtype == arrays[spec.name].dtype
    )
  assert origin_of(source).dtype == 'BF16' and len(origin_of(source).other_dtypes) == 2
  assert 'dtype' not in how.config and 'torch_dtype' not in how.config  # as it was


def test_fp8_is_dequantised_and_given_back_in_bfloat16(tmp_path: Path) -> None:
  config, arrays = random_model('deepseek_v3', 'BF16')
  config |= {
    'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [16, 16]},
    'torch_dtype': 'bfloat16',
  }
  rng, want = np.random.default_rng(1), {}
  for name in [name for name in arrays if name.endswith('proj.weight')]:
    rows, columns = arrays[name].shape
    blocks = arrays[name].astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (-(-rows // 16), -(-columns // 16))).astype(np.float32)
    want[name] = (
      blocks.astype(np.float32) * np.kron(scale, np.ones((16, 16), np.float32))[:rows, :columns]
    )
    arrays |= {name: blocks, f'{name}_scale_inv': scale}
  biases = [name for name in arrays if name.endswith('e_score_correction_bias')]
  arrays |= {name: arrays[name].astype(np.float32) + 1e-4 for name in biases}
  source = open_published(written(tmp_path / 'm', arrays, config))
  how, back = given_back(source, loaded(source))
  for spec in back:
    expected = (
      want[spec.name].astype(ml_dtypes.bfloat16) if spec.name in want else arrays[spec.name]
    )
    assert spec.load().tobytes() == expected.tobytes() and spec.dtype == (
      'F32' if spec.name in biases else 'BF16'
    )
  assert want and how.config == {k: v for k, v in config.items() if k != 'quantization_config'}


def test_mxfp4_is_dequantised_and_given_back_in_bfloat16(tmp_path: Path) -> None:
  moe = dataclasses.replace(FAMILIES['gpt_oss'].presets['tiny'].moe, d_expert=32)
  config, arrays = random_model('gpt_oss', 'BF16', moe=moe)
  rng, want = np.random.default_rng(1), {}
  for name in [name for name in arrays if name.endswith(('gate_up_proj', 'down_proj'))]:
    experts, rows, columns = arrays.pop(name).shape  # [E, in, out]: blocks run along `in`
    blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16), np.uint8)
    scales = rng.integers(120, 130, (experts, columns, rows // 32), np.uint8)
    fours = (
      np.stack([blocks & 15, blocks >> 4], -1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )
    numbers = fours.reshape(experts, columns, rows // 32, 32) * 2.0 ** (
      scales[..., None].astype(np.float32) - 127
    )
    want[name] = numbers.reshape(experts, columns, rows).swapaxes(1, 2)
    arrays |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
  source = open_published(
    written(tmp_path / 'm', arrays, config | {'quantization_config': {'quant_method': 'mxfp4'}})
  )
  leaves = loaded(source)
  first = want['model.layers.0.mlp.experts.gate_up_proj']
  assert (np.asarray(leaves['blocks.moe.experts.up'])[0] == first[..., 1::2]).all()
  how, back = given_back(source, leaves)
  for spec in back:
    expected = (
      want[spec.name].astype(ml_dtypes.bfloat16) if spec.name in want else arrays[spec.name]
    )
    assert spec.load().tobytes() == expected.tobytes() and spec.dtype == 'BF16'
  assert want and how.config == {**config, 'torch_dtype': 'bfloat16'}


def test_files_may_lack_multi_token_prediction_and_have_what_is_made_anew(tmp_path: Path) -> None:
  """As transformers writes them: the config speaks of layers that are not there. Tables of rope are passed over."""
  arrays = {
    name: a
    for name, a in arrays_in(GOLDEN / 'deepseek_v3').items()
    if not name.startswith('model.layers.3.')
  }
  config = json.loads((GOLDEN / 'deepseek_v3' / 'config.json').read_text())
  table = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}
  source = open_published(written(tmp_path / 'm', arrays | table, config))
  assert config['num_nextn_predict_layers'] == 1 and source.cfg.mtp_depth == 0
  how, back = given_back(source, loaded(source))
  assert how.config == config and {spec.name for spec in back} == {*arrays}


# ---- what a model is published as


def test_a_changed_model_is_written_anew(tmp_path: Path) -> None:
  """With what the old config.json says beside the model."""
  source = open_published(copied('mixtral', tmp_path / 'm'))
  changed = dataclasses.replace(source.cfg, norm_eps=1e-3)
  config = plan_export(run_config(changed, 'run'), origin_of(source), -1, '', '').config
  assert config['rms_norm_eps'] == 1e-3 and config['bos_token_id'] == source.config['bos_token_id']
  assert 'transformers_version' not in config and config != source.config


def test_a_bias_that_only_some_files_hold_is_in_a_changed_model_too(tmp_path: Path) -> None:
  """openPangu's, by a key of config.json."""
  arrays = arrays_in(GOLDEN / 'openpangu_ultra_moe')
  config = json.loads((GOLDEN / 'openpangu_ultra_moe' / 'config.json').read_text())
  config['router_enable_expert_bias'] = True
  layers, experts = (1, 2, 3), config['num_routed_experts']
  arrays |= {
    f'model.layers.{k}.mlp.e_score_correction_bias': np.full(experts, k, np.float32) for k in layers
  }
  source = open_published(written(tmp_path / 'm', arrays, config))
  leaves = loaded(source)
  assert np.asarray(leaves['router.bias']).tolist() == [[k] * experts for k in layers]
  how, back = given_back(source, leaves)
  assert how.config == config and {spec.name for spec in back} == {*arrays}
  moe = dataclasses.replace(
    source.cfg.moe, router=dataclasses.replace(source.cfg.moe.router, scale=2.0)
  )
  how = plan_export(
    run_config(dataclasses.replace(source.cfg, moe=moe), 'run'), origin_of(source), -1, '', ''
  )
  assert how.config != config and len(how.made_of['router.bias']) == 3


def test_the_only_family_that_can_hold_a_model_is_found() -> None:
  for kind, known in FAMILIES.items():
    cfg = ExperimentConfig(model=known.presets['tiny'], seq_len=77)
    how = plan_export(cfg, None, 5, kind, '')
    assert how.config['model_type'] == kind and {*how.dtypes.values()} == {'F32'}
    assert how.config['torch_dtype'] == 'float32' and how.config['bos_token_id'] == 5
    assert how.generation_config == {'bos_token_id': 5, 'eos_token_id': 5}
    assert len(how.copies) == 2 * cfg.model.mtp_depth
  assert plan_export(cfg, None, 5, '', '').config == how.config
  assert plan_export(cfg, None, -1, '', '').generation_config == {}
  deepseek = ExperimentConfig(model=FAMILIES['deepseek_v3'].presets['tiny'], seq_len=77)
  yarn = plan_export(deepseek, None, -1, '', 'bfloat16')
  assert (
    yarn.config['max_position_embeddings'] == 256 and how.config['max_position_embeddings'] == 77
  )
  assert {kind for name, kind in yarn.dtypes.items() if 'e_score' in name} == {'F32'}, (
    'steps of 1e-3 are lost in bf16'
  )
  assert {kind for name, kind in yarn.dtypes.items() if 'e_score' not in name} == {'BF16'}


def test_errors_say_what_cannot_be_held_and_by_whom() -> None:
  moe = dataclasses.replace(ModelConfig().moe, num_shared=1)
  odd = ExperimentConfig(model=ModelConfig(vocab_size=96, moe=moe, sandwich_norm=True))
  with pytest.raises(
    ConfigError, match='no family here(.|\n)*  mixtral: .*num_shared(.|\n)*  qwen3_moe: '
  ):
    plan_export(odd, None, -1, '', '')
  with pytest.raises(ConfigError, match='this family cannot(.|\n)*  llama: ') as error:
    plan_export(odd, None, -1, 'llama', '')
  assert 'mixtral' not in str(error.value)
  plain = dataclasses.replace(FAMILIES['llama'].presets['tiny'])
  with pytest.raises(ConfigError, match='as llama or mistral or mixtral: choose one with --family'):
    plan_export(ExperimentConfig(model=plain), None, -1, '', '')
  with pytest.raises(
    ConfigError, match=r"--family='gpt' is not one of (.|\n)*--dtype='int8' is not one of"
  ):
    plan_export(odd, None, -1, 'gpt', 'int8')


def test_a_router_bias_that_files_cannot_hold_is_no_silent_loss(tmp_path: Path) -> None:
  source = open_published(copied('mixtral', tmp_path / 'm'))
  leaves = {path: np.zeros(2, np.float32) for path in source.made_of}
  assert not lost(source.known, source.config, source.made_of, leaves)
  leaves['router.bias'] = np.ones(2, np.float32)
  [problem] = lost(source.known, source.config, source.made_of, leaves)
  assert problem.startswith(
    "router.bias is not zero, and files of model_type='mixtral' cannot hold it"
  )


# ---- what is refused


def test_copies_that_differ_are_another_model(tmp_path: Path) -> None:
  arrays = arrays_in(GOLDEN / 'deepseek_v3')
  config = json.loads((GOLDEN / 'deepseek_v3' / 'config.json').read_text())
  arrays['model.layers.3.shared_head.head.weight'][7, 3] += 1
  with pytest.raises(
    ConfigError,
    match="expected 'model.layers.3.shared_head.head.weight' to repeat 'lm_head.weight'",
  ):
    loaded(open_published(written(tmp_path / 'm', arrays, config)))


def test_a_mesh_that_does_not_divide_is_told_by_path(tmp_path: Path) -> None:
  source = open_published(copied('mixtral', tmp_path / 'm'))
  with pytest.raises(
    ConfigError, match=r"moe.experts.gate\[2, 6, 24, 14\] does not divide over mesh .*'expert'"
  ):
    loaded(source, MeshConfig(expert=8))


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
  config, arrays = random_model('mixtral', 'F32')
  arrays['model.norm.weight'] = arrays['model.norm.weight'].astype(np.float64)
  with pytest.raises(
    ConfigError, match=r"model.safetensors: 'model.norm.weight' is F64: convert it to one of"
  ):
    open_published(written(tmp_path / 'm', arrays, config))


def test_problems_name_the_directory_and_the_file(tmp_path: Path) -> None:
  directory = copied('mixtral', tmp_path / 'm')
  edited(directory, 'config.json', model_type='mamba')
  with pytest.raises(
    ConfigError, match=f"^{directory}: config.json: model_type='mamba' is not known here"
  ):
    open_published(directory)
  (directory / 'config.json').unlink()
  with pytest.raises(ConfigError, match='holds no config.json'):
    open_published(directory)
