"""Published tensors to parameters and back: to the byte, and only where files fit."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES
from moejax.hf import leaf_reader
from moejax.hf.export_plan import origin_of, plan_export
from moejax.hf.import_model import run_config
from moejax.hf.safetensors.file import DTYPES
from moejax.hf.weights import open_published
from moejax.sharding.mesh import MeshConfig
from tests.hf.round_trip import given_back, loaded
from tests.support.published_models import (
  GOLDEN,
  NAMES,
  arrays_in,
  copied,
  edited,
  random_model,
  written,
)


@pytest.mark.parametrize('name', NAMES)
def test_a_golden_comes_back_to_the_byte(name: str, tmp_path: Path) -> None:
  source = open_published(copied(name, tmp_path / name))
  how, back = given_back(source, loaded(source))
  assert {spec.name for spec in back} == {*source.tensors.names}
  for spec in back:
    assert spec.dtype == source.tensors.dtype(spec.name)
    assert spec.shape == source.tensors.shape(spec.name)
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
  back = plan_export(run_config(other.cfg, 'run'), origin_of(other), {}, '', '')
  assert back.config == other.config


def test_every_bit_of_every_dtype_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """With numbers too small for many processors, in dtypes mixed within a layer and a stack."""
  monkeypatch.setattr(leaf_reader, 'SMALL', 0)
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
  finite = np.where(np.isfinite(table.astype(np.float32)), table, 0)
  arrays['model.embed_tokens.weight'] = finite.reshape(2048, 32)
  tiny = np.array([1, 2**31 + 1, 2**23 - 1, 2**23], np.uint32).view(np.float32)
  arrays['model.norm.weight'] = np.resize(tiny, 32)
  # With nothing but bfloat16 in its stack, the first numbers above zero, which the mesh casts.
  flat = arrays['model.layers.1.self_attn.q_proj.weight'].reshape(-1)
  flat[:256] = bits[:256].view(ml_dtypes.bfloat16)
  source = open_published(written(tmp_path / 'm', arrays, config))
  how, back = given_back(source, loaded(source))
  for spec in back:
    assert spec.load().tobytes() == arrays[spec.name].tobytes()
    assert spec.load().dtype == arrays[spec.name].dtype
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
    scale_of_each = np.kron(scale, np.ones((16, 16), np.float32))[:rows, :columns]
    want[name] = blocks.astype(np.float32) * scale_of_each
    arrays |= {name: blocks, f'{name}_scale_inv': scale}
  biases = [name for name in arrays if name.endswith('e_score_correction_bias')]
  arrays |= {name: arrays[name].astype(np.float32) + 1e-4 for name in biases}
  source = open_published(written(tmp_path / 'm', arrays, config))
  how, back = given_back(source, loaded(source))
  for spec in back:
    expected = (
      want[spec.name].astype(ml_dtypes.bfloat16) if spec.name in want else arrays[spec.name]
    )
    assert spec.load().tobytes() == expected.tobytes()
    assert spec.dtype == ('F32' if spec.name in biases else 'BF16')
  assert want and how.config == {k: v for k, v in config.items() if k != 'quantization_config'}


def test_mxfp4_is_dequantised_and_given_back_in_bfloat16(tmp_path: Path) -> None:
  moe = dataclasses.replace(FAMILIES['gpt_oss'].presets['tiny'].moe, d_expert=32)
  config, arrays = random_model('gpt_oss', 'BF16', moe=moe)
  rng, want = np.random.default_rng(1), {}
  for name in [name for name in arrays if name.endswith(('gate_up_proj', 'down_proj'))]:
    experts, rows, columns = arrays.pop(name).shape  # [E, in, out]: blocks run along `in`
    blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16), np.uint8)
    scales = rng.integers(120, 130, (experts, columns, rows // 32), np.uint8)
    nibbles = np.stack([blocks & 15, blocks >> 4], -1)
    fours = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = 2.0 ** (scales[..., None].astype(np.float32) - 127)
    numbers = fours.reshape(experts, columns, rows // 32, 32) * powers
    want[name] = numbers.reshape(experts, columns, rows).swapaxes(1, 2)
    arrays |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
  quantised = config | {'quantization_config': {'quant_method': 'mxfp4'}}
  source = open_published(written(tmp_path / 'm', arrays, quantised))
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
  """As transformers writes them: the config speaks of layers that the files have not.

  Tables of rope, which old files hold, are passed over.
  """
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


def test_copies_that_differ_are_another_model(tmp_path: Path) -> None:
  arrays = arrays_in(GOLDEN / 'deepseek_v3')
  config = json.loads((GOLDEN / 'deepseek_v3' / 'config.json').read_text())
  arrays['model.layers.3.shared_head.head.weight'][7, 3] += 1
  with pytest.raises(
    ConfigError,
    match="expected 'model.layers.3.shared_head.head.weight' to repeat 'lm_head.weight'",
  ):
    loaded(open_published(written(tmp_path / 'm', arrays, config)))


def tied_with_a_head(path: Path, change: float) -> Path:
  """A tied model whose file repeats the embedding as its head, one number of it changed."""
  config, arrays = random_model('llama', 'BF16', tie_embeddings=True)
  assert config['tie_word_embeddings'] and 'lm_head.weight' not in arrays
  head = arrays['model.embed_tokens.weight'].copy()
  head[5, 3] += change
  return written(path, arrays | {'lm_head.weight': head}, config)


def test_a_tied_head_in_a_file_is_read_and_given_back(tmp_path: Path) -> None:
  source = open_published(tied_with_a_head(tmp_path / 'm', 0))
  assert source.copies == {'lm_head.weight': 'model.embed_tokens.weight'}
  _, back = given_back(source, loaded(source))
  assert {spec.name for spec in back} == {*source.tensors.names}
  head = next(spec for spec in back if spec.name == 'lm_head.weight')
  assert head.load().tobytes() == source.tensors.read('lm_head.weight').tobytes()
  trained_here = dataclasses.replace(run_config(source.cfg, 'run'), steps=3)
  assert not plan_export(trained_here, None, {}, 'llama', '').copies, 'where none was found'
  changed = open_published(tied_with_a_head(tmp_path / 'other', 1))
  with pytest.raises(
    ConfigError, match='other numbers from row 0; .*tie_word_embeddings=true: set'
  ):
    loaded(changed)


@pytest.mark.parametrize('number', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['F32', 'BF16', 'F16'])
def test_a_number_that_is_not_finite_is_told_by_its_tensor(
  dtype: str, number: float, tmp_path: Path
) -> None:
  config, arrays = random_model('mixtral', dtype)
  name = 'model.layers.1.block_sparse_moe.experts.2.w2.weight'
  arrays[name][3, 1] = number
  source = open_published(written(tmp_path / 'm', arrays, config))
  with pytest.raises(ConfigError, match=f"'{name}' has 1 numbers that are NaN or infinite"):
    loaded(source)


UNEXPECTED = {
  'gptq': ('model.layers.0.self_attn.q_proj.qweight', 'GPTQ or AWQ', 'model.dequantize()'),
  'bnb': ('model.layers.0.self_attn.q_proj.weight.absmax', 'bitsandbytes', 'model.dequantize()'),
  'nvfp4': ('model.layers.0.self_attn.q_proj.weight_scale_2', 'NVFP4', 'model.dequantize()'),
  'packed': ('model.layers.0.self_attn.q_proj.weight_packed', 'compressed-tensors', 'bfloat16'),
  'lora': ('model.layers.0.self_attn.q_proj.lora_A.weight', 'an adapter', 'merge_and_unload'),
  'compiled': ('_orig_mod.model.norm.weight', 'a wrapped model', 'inside of the wrapper'),
  'pictures': ('model.visual.patch_embed.weight', 'pictures and text', 'only the text part'),
  'layers': ('model.layers.7.input_layernorm.weight', 'layers up to 7', 'num_hidden_layers=2'),
}


@pytest.mark.parametrize('kind', UNEXPECTED)
def test_what_made_a_tensor_unexpected_is_told(kind: str, tmp_path: Path) -> None:
  name, *told = UNEXPECTED[kind]
  config, arrays = random_model('mixtral', 'F32')
  arrays[name] = np.ones(32, np.float32)
  with pytest.raises(ConfigError) as error:
    open_published(written(tmp_path / 'm', arrays, config))
  for part in (*told, name):
    assert part in str(error.value)
  assert 'fetch' not in str(error.value)


def test_padded_headless_and_untied_files_are_told(tmp_path: Path) -> None:
  config, arrays = random_model('mixtral', 'F32')
  table = arrays['model.embed_tokens.weight']
  padded = {'model.embed_tokens.weight': np.pad(table, ((0, 32), (0, 0)))}
  bare = {name.removeprefix('model.'): a for name, a in arrays.items() if name != 'lm_head.weight'}
  no_head = {name: a for name, a in arrays.items() if name != 'lm_head.weight'}
  for i, (changed, told) in enumerate(
    (
      (arrays | padded, 'has 128 rows, as vocabularies are padded: set vocab_size=128'),
      (bare, 'save the model as AutoModelForCausalLM'),
      (no_head, 'set tie_word_embeddings=true'),
    )
  ):
    with pytest.raises(ConfigError, match=told) as error:
      open_published(written(tmp_path / f'{i}', changed, config))
    assert 'fetch' not in str(error.value)


def test_scales_of_activations_are_passed_over(tmp_path: Path) -> None:
  config, arrays = random_model('mixtral', 'F32')
  scales = {
    f'model.layers.0.self_attn.{k}': np.ones((), np.float32) for k in ('k_scale', 'v_scale')
  }
  source = open_published(written(tmp_path / 'm', arrays | scales, config))
  assert {spec.name for spec in given_back(source, loaded(source))[1]} == {*arrays}


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
