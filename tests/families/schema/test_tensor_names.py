"""Names of tensors: every number in one place of a file, and what files do not hold."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES, config_json, model_config
from moejax.families.schema.tensor_names import (
  ABSENT,
  FROM_FILE,
  copies,
  file_shapes,
  holds_mtp,
  leaves,
  must_be_zero,
  tensors,
  to_file,
)
from moejax.hf.safetensors.file import read_header
from tests.families.tiny_configs import TINY, changed, made_of

GOLDEN = Path(__file__).parents[2] / 'golden'
GOLDENS = sorted(path.relative_to(GOLDEN) for path in GOLDEN.glob('*/config*.json'))


@pytest.mark.parametrize('path', GOLDENS, ids=str)
def test_the_files_of_public_implementations_are_as_expected(path: Path) -> None:
  config = json.loads((GOLDEN / path).read_text())
  stored = {
    name: tensor.shape
    for file in (GOLDEN / path.parent).glob('*.safetensors')
    for name, tensor in read_header(file).items()
  }
  known, cfg = model_config(config)
  shapes = leaves(cfg)
  parts = tensors(known.names, cfg, config, shapes)
  repeated = {name: shapes[original] for name, original in copies(cfg, shapes).items()}
  expected = file_shapes(parts)
  for name, shape in repeated.items():
    expected[name] = shape if 'embed' in name else shape[::-1]
  assert expected == stored
  # The same model, exported under the config that we write.
  written = tensors(known.names, cfg, config_json(known, cfg, {}), shapes)
  assert file_shapes(written) == file_shapes(parts)


@pytest.mark.parametrize('kind', FAMILIES)
def test_every_number_lies_in_one_place_of_a_file(kind: str) -> None:
  cfg = TINY[kind]
  shapes, parts, table = leaves(cfg), made_of(kind, cfg), FAMILIES[kind].names
  assert parts.keys() == shapes.keys()
  assert not ({'router.bias', 'moe.router'} - {path.removeprefix('blocks.') for path in parts})
  for path, found in parts.items():
    filled = np.zeros(shapes[path], int)
    for tensor in found:
      filled[tensor.index] += 1
      shape = FROM_FILE[tensor.how](np.empty(tensor.shape)).shape
      assert shape == filled[tensor.index].shape, (path, tensor)
    absent = not found
    assert absent or (filled == 1).all(), path
    assert not absent or path in ('router.bias', 'blocks.moe.router'), path
  places = [(tensor.name, tensor.how) for found in parts.values() for tensor in found]
  assert len(places) == len(set(places))
  assert all(row.how in (*FROM_FILE, *ABSENT) for row in table.values())


def test_layers_are_numbered_dense_then_experts_then_mtp() -> None:
  cfg = dataclasses.replace(TINY['deepseek_v3'], num_layers=4, mtp_depth=2)
  parts = made_of('deepseek_v3', cfg)

  def names(path: str) -> list[str]:
    return [tensor.name for tensor in parts[path]]

  bias = 'model.layers.{}.mlp.gate.e_score_correction_bias'
  assert names('router.bias') == [bias.format(i) for i in (1, 2, 3, 4, 5)]
  assert names('dense_blocks.ffn.up') == ['model.layers.0.mlp.up_proj.weight']
  down = 'model.layers.2.mlp.experts.1.down_proj.weight'
  assert parts['blocks.moe.experts.down'][9] == (down, (1, 1), 'transposed', (32, 20))
  router = 'model.layers.{}.mlp.gate.weight'
  assert names('mtp.block.moe.router') == [router.format(i) for i in (4, 5)]
  assert [tensor[:3] for tensor in parts['mtp.projection.w']] == [
    (f'model.layers.{4 + k}.eh_proj.weight', (k,), 'transposed') for k in (0, 1)
  ]
  assert copies(cfg, leaves(cfg)) == {
    f'model.layers.{i}.{name}.weight': path
    for i in (4, 5)
    for name, path in (('embed_tokens', 'embed.table'), ('shared_head.head', 'head.w'))
  }


def test_the_config_of_mtp_layers_without_the_layers() -> None:
  """transformers saves it so: the caller then takes mtp_depth for 0."""
  cfg = TINY['glm4_moe']
  names = set(file_shapes(made_of('glm4_moe', cfg)))
  assert holds_mtp(cfg, names)
  assert not holds_mtp(cfg, {name for name in names if not name.startswith('model.layers.3.')})
  assert not holds_mtp(dataclasses.replace(cfg, mtp_depth=0), names)


def test_a_tied_head_is_not_in_the_file() -> None:
  cfg = dataclasses.replace(TINY['qwen3'], tie_embeddings=True)
  assert 'lm_head.weight' in file_shapes(made_of('qwen3', TINY['qwen3']))
  assert 'lm_head.weight' not in file_shapes(made_of('qwen3', cfg))
  repeated = copies(dataclasses.replace(cfg, mtp_depth=1), leaves(cfg))
  assert list(repeated.values()) == ['embed.table']


def test_what_files_do_not_hold_must_be_zero() -> None:
  pangu, bias = FAMILIES['pangu_ultra_moe'], 'router_enable_expert_bias'
  assert must_be_zero(FAMILIES['mixtral'].names, {}) == {'router.bias'}
  assert must_be_zero(FAMILIES['llama'].names, {}) == {'router.bias'}
  assert must_be_zero(FAMILIES['deepseek_v3'].names, {}) == set()
  assert must_be_zero(pangu.names, {}) == {'router.bias'}
  assert must_be_zero(pangu.names, {bias: False}) == {'router.bias'}
  assert must_be_zero(pangu.names, {bias: True}) == set()
  assert not made_of('pangu_ultra_moe', TINY['pangu_ultra_moe'])['router.bias']
  parts = made_of('pangu_ultra_moe', TINY['pangu_ultra_moe'], **{bias: True})
  names = [tensor.name for tensor in parts['router.bias']]
  assert names == [f'model.layers.{i}.mlp.e_score_correction_bias' for i in (1, 2, 3)]


def test_a_parameter_without_a_name_is_refused() -> None:
  noisy = changed(TINY['mixtral'], 'moe.router.noisy', True)
  with pytest.raises(
    ConfigError, match=r"blocks.moe.noise\[2, 32, 4\] has no place in files of model_type='mixtral'"
  ):
    tensors(FAMILIES['mixtral'].names, noisy, {'model_type': 'mixtral'}, leaves(noisy))


@pytest.mark.parametrize('hows', [('same',), ('transposed',), ('even', 'odd')])
def test_to_the_file_and_back(hows: tuple[str, ...]) -> None:
  parts = {how: np.random.default_rng(i).normal(size=(3, 4)) for i, how in enumerate(hows)}
  file = to_file(parts)
  assert file.size == 12 * len(hows)
  for how, ours in parts.items():
    np.testing.assert_array_equal(FROM_FILE[how](file), ours)
