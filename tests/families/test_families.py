"""Families as data: presets against published configs, both ways of config.json, name tables, parameter counts."""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.families import FAMILIES, config_json, model_config
from moejax.families.schema.family import KEPT, UNBUILT
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
from moejax.model.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters
from tests.support.published_configs import FIGURES, PUBLISHED

T = TypeVar('T')
GOLDEN = Path(__file__).parents[1] / 'golden'
GOLDENS = sorted(path.relative_to(GOLDEN) for path in GOLDEN.glob('*/config*.json'))
PRESETS = [(kind, preset) for kind, known in FAMILIES.items() for preset in known.presets]
IDS = {
  keys: [f'{kind}-{preset}' for kind, preset in rows]
  for keys, rows in (('presets', PRESETS), ('published', PUBLISHED), ('figures', FIGURES))
}
TINY = {kind: known.presets['tiny'] for kind, known in FAMILIES.items()}
# Published keys that say nothing of what the weights compute, beside KEPT.
INERT = {
  'initial_context_length',
  'pretraining_tp',
  'quantization_config',
  'torch_dtype',
  'use_cache',
}
# The original spelling of openPangu, from the configuration class of Huawei's pull request to transformers.
ORIGINAL = {
  'first_k_dense_replace': 'num_dense_layers',
  'n_routed_experts': 'num_routed_experts',
  'n_shared_experts': 'num_shared_experts',
  'q_lora_rank': 'attention_q_lora_dim',
  'kv_lora_rank': 'attention_kv_lora_dim',
  'qk_nope_head_dim': 'attention_qk_dim',
  'qk_rope_head_dim': 'attention_qk_rope_dim',
  'v_head_dim': 'attention_v_dim',
  'num_nextn_predict_layers': 'num_mtp_layers',
}


def tiny(kind: str, **changes: object) -> dict:
  """config.json of the tiny preset, with other keys; a key that is to be ... is not there."""
  config = config_json(FAMILIES[kind], TINY[kind], {'max_position_embeddings': 512}) | changes
  return {name: value for name, value in config.items() if value is not ...}


def read(config: dict) -> ModelConfig:
  return model_config(config)[1]


def made_of(kind: str, cfg: ModelConfig, **config: object) -> dict:
  known = FAMILIES[kind]
  return tensors(known.names, cfg, config_json(known, cfg, config), leaves(cfg))


# ---- presets


@pytest.mark.parametrize(('kind', 'preset'), PUBLISHED, ids=IDS['published'])
def test_the_preset_is_the_published_config(kind: str, preset: str) -> None:
  known, published = FAMILIES[kind], PUBLISHED[kind, preset]
  cfg = known.presets[preset]
  assert model_config(published) == (known, cfg)
  written = config_json(known, cfg, {})
  off = (
    {'sliding_window', 'max_window_layers'}
    if not written.get('use_sliding_window', True)
    else set()
  )
  for name, value in published.items():
    name = known.aliases[name] if name in known.aliases else name
    if name == 'rope_scaling' and value:
      kinds = {'type': 'yarn', 'rope_type': 'yarn'}
      assert written[name] == value | kinds
    elif name in written and name not in off:
      assert written[name] == value and type(written[name]) in (type(value), float), (
        name,
        written[name],
        value,
      )
    else:
      assert name in KEPT | INERT | off, f'{name}={value!r} is not read'


def test_every_published_preset_is_compared() -> None:
  assert (
    set(PUBLISHED)
    == {(kind, preset) for kind, preset in PRESETS if preset != 'tiny'}
    == set(FIGURES)
  )
  assert all(next(iter(known.presets)) == 'full' for known in FAMILIES.values())


@pytest.mark.parametrize(('kind', 'preset'), PRESETS, ids=IDS['presets'])
def test_a_preset_comes_back_from_its_config_json(kind: str, preset: str) -> None:
  cfg = FAMILIES[kind].presets[preset]
  written = config_json(FAMILIES[kind], cfg, {'bos_token_id': 5, 'max_position_embeddings': 99})
  assert written['bos_token_id'] == 5 and written['model_type'] == kind
  known, back = model_config(json.loads(json.dumps(written)))
  assert back == cfg and config_json(known, back, {}) == config_json(known, cfg, {})


def test_what_the_file_does_not_say_is_not_lost_and_not_asked() -> None:
  cfg = dataclasses.replace(TINY['mixtral'], dtype='bfloat16', remat='full', unroll=2, d_ff=77)
  assert read(config_json(FAMILIES['mixtral'], cfg, {})) == TINY['mixtral']


# ---- parameter counts


@pytest.mark.parametrize(('kind', 'preset'), FIGURES, ids=IDS['figures'])
def test_parameters_are_as_many_as_published(kind: str, preset: str) -> None:
  cfg = FAMILIES[kind].presets[preset]
  model = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
  count = count_parameters(model, ExperimentConfig(model=cfg))
  less = {'all': 0, 'embed': count.embedding, 'both': 2 * count.embedding}
  total, total_counts, active, active_counts = FIGURES[kind, preset]
  found = (
    count.total - count.mtp * ('mtp' not in total_counts) - less[total_counts.removesuffix('+mtp')]
  )
  for ours, theirs in ((found, total), (count.active - less[active_counts], active)):
    digits = len(str(theirs).partition('.')[2])
    assert abs(ours / 1e9 - theirs) <= 0.51 * 10**-digits, (ours / 1e9, theirs)


# ---- config.json: what it may say, and how


@pytest.mark.parametrize(('kind', 'preset'), PUBLISHED, ids=IDS['published'])
def test_both_spellings_of_rope_are_one(kind: str, preset: str) -> None:
  older = PUBLISHED[kind, preset]
  newer = {
    k: v
    for k, v in older.items()
    if k not in ('rope_theta', 'rope_scaling', 'partial_rotary_factor')
  }
  scaling = dict(older['rope_scaling'] if older.get('rope_scaling') else {'type': 'default'})
  newer['rope_parameters'] = (
    {k: v for k, v in scaling.items() if k != 'type'}
    | {'rope_type': scaling.get('type') or scaling['rope_type']}
    | {k: older[k] for k in ('rope_theta', 'partial_rotary_factor') if k in older}
  )
  assert read(newer) == read(older)


def test_both_spellings_of_openpangu_are_one() -> None:
  published = PUBLISHED['pangu_ultra_moe', 'full']
  original = {ORIGINAL[k] if k in ORIGINAL else k: v for k, v in published.items()}
  assert len(set(original) - set(published)) == len(ORIGINAL)
  assert read(original) == read(published) == read(original | published)
  with pytest.raises(
    ConfigError, match='num_mtp_layers=2 and num_nextn_predict_layers=1 are one thing'
  ):
    read(published | {'num_mtp_layers': 2})


def test_num_experts_has_two_names_in_qwen3() -> None:
  config = tiny('qwen3_moe')
  assert read(config | {'num_local_experts': 8}) == read(config)
  assert read(tiny('qwen3_moe', num_experts=..., num_local_experts=8)) == read(config)


def yarn(kind: str, **scaling: object) -> object:
  return read(tiny(kind, rope_scaling={'rope_type': 'yarn'} | scaling)).attention.rope.yarn


def test_yarn_without_a_length_or_a_factor() -> None:
  assert yarn('qwen3_moe', factor=4.0).original_length == 512
  assert yarn('qwen3_moe', original_max_position_embeddings=128).factor == 4.0
  assert (
    yarn('qwen3_moe', factor=4.0, attention_factor=None, mscale=None, truncate=None).truncate
    is True
  )
  assert yarn('deepseek_v3', factor=4.0, mscale_all_dim=0.5).mscale_all_dim == 0.5
  assert yarn('gpt_oss', factor=8.0, original_max_position_embeddings=64).truncate is True
  with pytest.raises(ConfigError, match='max_position_embeddings is missing'):
    read(
      tiny('qwen3_moe', max_position_embeddings=..., rope_scaling={'type': 'yarn', 'factor': 2.0})
    )


def test_gpt_oss_has_yarn_unless_another_rope_is_said() -> None:
  bare = tiny('gpt_oss', rope_scaling=..., rope_theta=...)
  assert read(bare) == TINY['gpt_oss']
  assert read(bare | {'rope_theta': 10.0}) == changed(TINY['gpt_oss'], 'attention.rope.theta', 10.0)
  plain = read(bare | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 7.0}})
  assert plain.attention.rope.yarn.factor == 1.0 and plain.attention.rope.theta == 7.0
  assert read(config_json(FAMILIES['gpt_oss'], plain, {})) == plain


WINDOWS = [
  ('mixtral', {'sliding_window': None}, (0,)),
  ('mixtral', {'sliding_window': ...}, (0,)),
  ('mixtral', {'sliding_window': 5}, (5,)),
  ('mistral', {'sliding_window': ...}, (4096,)),
  ('mistral', {'sliding_window': None}, (0,)),
  ('qwen3_moe', {'use_sliding_window': False, 'sliding_window': 5}, (0,)),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': 5}, (5,)),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': None}, (0,)),
  ('gpt_oss', {'layer_types': ..., 'sliding_window': 3}, (3, 0)),
  ('gpt_oss', {'layer_types': ['full_attention'] * 4}, (0,)),
  (
    'gpt_oss',
    {'layer_types': ['full_attention'] * 3 + ['sliding_attention'], 'sliding_window': 3},
    (0, 0, 0, 3),
  ),
  ('gpt_oss', {'num_hidden_layers': 3, 'layer_types': ...}, (8, 0)),
  # transformers 5: every other layer below max_window_layers in Qwen2-MoE, all layers from it on in Qwen2 and Qwen3
  (
    'qwen2_moe',
    {'layer_types': ..., 'num_hidden_layers': 5, 'max_window_layers': 3},
    (8, 0, 8, 0, 0),
  ),
  ('qwen2', {'layer_types': ..., 'num_hidden_layers': 4, 'max_window_layers': 3}, (0, 0, 0, 8)),
  ('qwen3', {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0}, (8,)),
]


@pytest.mark.parametrize(('kind', 'said', 'windows'), WINDOWS)
def test_which_layers_slide(kind: str, said: dict, windows: tuple[int, ...]) -> None:
  cfg = read(tiny(kind, **said))
  assert cfg.attention.windows == windows
  back = read(config_json(FAMILIES[kind], cfg, {}))
  every = [
    [w.attention.windows[i % len(w.attention.windows)] for i in range(cfg.num_layers)]
    for w in (cfg, back)
  ]
  assert every[0] == every[1]


def test_absent_keys_mean_what_transformers_means() -> None:
  assert read(tiny('llama', num_key_value_heads=..., head_dim=...)).attention.num_kv_heads == 4
  assert read(tiny('llama', head_dim=None)).attention.d_head == 8
  assert read(tiny('gpt_oss', num_key_value_heads=None)).attention.num_kv_heads == 4
  assert read(tiny('deepseek_v2', topk_method='greedy')).moe.router.num_groups == 1
  assert read(tiny('deepseek_v2', q_lora_rank=None)).attention.latent.q_rank == 0
  assert read(tiny('deepseek_v3', rope_interleave=...)).attention.rope.interleaved
  assert not read(tiny('deepseek_v3', rope_interleave=False)).attention.rope.interleaved
  assert read(tiny('deepseek_v3', attention_bias=True)).attention.out_bias
  assert not read(tiny('glm4_moe', attention_bias=True)).attention.out_bias
  assert read(tiny('glm4_moe', use_qk_norm=...)).attention.qk_norm == ''
  assert read(tiny('olmoe', clip_qkv=...)).attention.clip_qkv == 0
  assert read(tiny('pangu_ultra_moe', rms_norm_eps=1e-3)).attention.latent.norm_eps == 1e-3
  assert read(tiny('deepseek_v3', rms_norm_eps=1e-3)).attention.latent.norm_eps == 1e-6
  assert read(tiny('qwen3_moe', mlp_only_layers=None)).num_dense_layers == 0


BAD = [
  # contradictions and wrong values, in the words of config.json
  ('deepseek_v3', {'n_group': 3}, 'n_group=3 does not divide n_routed_experts=8'),
  ('deepseek_v3', {'topk_group': 9}, 'topk_group=9: use 1 to n_group=4'),
  ('deepseek_v3', {'num_key_value_heads': 2}, 'num_key_value_heads=2: use num_attention_heads=4'),
  (
    'deepseek_v3',
    {'qk_head_dim': 10},
    r'qk_head_dim=10 is not qk_nope_head_dim=10 \+ qk_rope_head_dim=8',
  ),
  (
    'deepseek_v3',
    {'first_k_dense_replace': 3},
    'first_k_dense_replace=3: use 0 to num_hidden_layers - 1 = 2',
  ),
  ('mixtral', {'num_experts_per_tok': 5}, 'num_experts_per_tok=5: use 1 to num_local_experts=4'),
  (
    'mixtral',
    {'num_key_value_heads': 3},
    'num_key_value_heads=3 does not divide num_attention_heads=4',
  ),
  (
    'mixtral',
    {'hidden_size': 30, 'head_dim': ...},
    'hidden_size=30 does not divide into num_attention_heads=4',
  ),
  ('mixtral', {'vocab_size': 0}, 'vocab_size=0: use 1 or more'),
  ('mixtral', {'hidden_size': '32'}, "hidden_size='32' is str; give int"),
  ('mixtral', {'rms_norm_eps': None}, 'rms_norm_eps=null: give a value'),
  (
    'gpt_oss',
    {'layer_types': ['full_attention']},
    'layer_types names 1 layers of num_hidden_layers=4',
  ),
  ('gpt_oss', {'layer_types': 'full'}, "layer_types='full': use a list"),
  ('gpt_oss', {'num_experts': 4}, 'num_experts=4 and num_local_experts=8 are one thing'),
  ('gpt_oss', {'sliding_window': 0}, 'sliding_window=0: use null'),
  (
    'qwen2_moe',
    {'shared_expert_intermediate_size': 30},
    'shared_expert_intermediate_size=30 is not a multiple',
  ),
  (
    'qwen3_moe',
    {'rope_theta': 5.0, 'rope_parameters': {'rope_theta': 6.0}},
    'rope_theta=5.0 and rope_theta=6.0',
  ),
  # missing
  ('mixtral', {'hidden_size': ...}, 'hidden_size is missing: copy it from'),
  ('mixtral', {'num_local_experts': ...}, 'num_local_experts is missing'),
  ('mixtral', {'rms_norm_eps': ...}, 'rms_norm_eps is missing'),
  ('deepseek_v2', {'num_experts_per_tok': ...}, 'num_experts_per_tok is missing'),
  ('pangu_ultra_moe', {'rms_norm_eps': ...}, 'rms_norm_eps is missing'),
  (
    'pangu_ultra_moe',
    {'sandwich_norm': ...},
    "sandwich_norm is missing: .* model_type='deepseek_v3'",
  ),
  # not built
  ('mixtral', {'hidden_act': 'gelu'}, "hidden_act='gelu': use 'silu'"),
  ('llama', {'mlp_bias': True}, 'mlp_bias=True: use False'),
  (
    'llama',
    {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
    "rope_type='llama3' is not built here",
  ),
  (
    'qwen2',
    {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
    "rope_type='dynamic' is not built here",
  ),
  (
    'mistral',
    {'rope_parameters': {'rope_type': 'longrope'}},
    "rope_type='longrope' is not built here",
  ),
  (
    'gpt_oss',
    {'rope_parameters': {'full_attention': {'rope_theta': 1e4}}},
    '.*use one table for all layers',
  ),
  ('gpt_oss', {'layer_types': ['chunked_attention'] * 4}, "layer_types has 'chunked_attention'"),
  ('mixtral', {'rope_scaling': [1]}, r'rope_parameters=\[1\]: use one table'),
  (
    'mixtral',
    {'partial_rotary_factor': 0.5},
    'partial_rotary_factor=0.5: this family rotates whole heads',
  ),
  (
    'qwen3_moe',
    {'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'mscale_all_dim': 1.0}},
    'mscale_all_dim=1.0 scale',
  ),
  ('qwen3_moe', {'decoder_sparse_step': 2}, 'decoder_sparse_step=2: use 1'),
  (
    'qwen3_moe',
    {'mlp_only_layers': [0, 2]},
    r'mlp_only_layers=\[0, 2\]: use the first layers, \[0, 1\]',
  ),
  ('qwen3_moe', {'mlp_only_layers': 2}, 'mlp_only_layers=2: use a list'),
  (
    'qwen3_moe',
    {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 2},
    'max_window_layers=2',
  ),
  ('deepseek_v3', {'moe_layer_freq': 2}, 'moe_layer_freq=2: use 1'),
  ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func='softmax': use 'sigmoid'"),
  ('deepseek_v3', {'topk_method': 'greedy'}, "topk_method='greedy': use 'noaux_tc'"),
  (
    'deepseek_v2',
    {'topk_method': 'noaux_tc'},
    "topk_method='noaux_tc': use greedy or group_limited_greedy",
  ),
  ('deepseek_v2', {'norm_topk_prob': True}, 'norm_topk_prob=True: use False'),
  *(('pangu_ultra_moe', {name: 128}, f'{name}=128 is not built here') for name in UNBUILT),
  ('pangu_ultra_moe', {'use_mhc': True}, 'use_mhc=True is not built here'),
  ('glm4_moe', {'use_qk_norm': 'yes'}, "use_qk_norm='yes': use true or false"),
]


@pytest.mark.parametrize(('kind', 'said', 'message'), BAD)
def test_a_bad_config_says_what_and_what_instead(kind: str, said: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=f'^config.json: {message}'):
    read(tiny(kind, **said))


def test_what_is_off_is_as_good_as_absent() -> None:
  assert (
    read(tiny('pangu_ultra_moe', use_mhc=False, param_sink_number=0, swa_layers=[]))
    == TINY['pangu_ultra_moe']
  )


def test_all_problems_are_told_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    read(
      tiny(
        'mixtral', hidden_act='gelu', vocab_size=..., rope_scaling={'type': 'linear', 'factor': 2}
      )
    )
  assert len(error.value.problems) == 3


@pytest.mark.parametrize('config', [{}, {'model_type': 'bert'}, {'model_type': ['llama']}])
def test_an_unknown_model_type_lists_what_is_known(config: dict) -> None:
  with pytest.raises(
    ConfigError,
    match=r"model_type=.* is not known here: use one of \['deepseek_v2', .*'qwen3_moe'\]$",
  ):
    model_config(config)


HELD_NOWHERE = [
  ('mixtral', 'attention.windows', (8, 0)),
  ('gpt_oss', 'attention.windows', (8, 4)),
  ('mixtral', 'attention.qk_norm', 'head'),
  ('olmoe', 'attention.qk_norm', 'head'),
  ('deepseek_v3', 'attention.qkv_bias', True),
  ('glm4_moe', 'attention.out_bias', True),
  ('gpt_oss', 'attention.sinks', False),
  ('qwen3_moe', 'attention.clip_qkv', 1.0),
  ('mixtral', 'mtp_depth', 1),
  ('deepseek_v3', 'sandwich_norm', True),
  ('pangu_ultra_moe', 'sandwich_norm', False),
  ('pangu_ultra_moe', 'norm_eps', 1e-3),
  ('deepseek_v3', 'attention.latent.norm_eps', 1e-3),
  ('llama', 'num_dense_layers', 1),
  ('qwen3_moe', 'moe.num_shared', 1),
  ('qwen2_moe', 'moe.shared_gate', False),
  ('mixtral', 'moe.router.renormalise', False),
  ('deepseek_v2', 'moe.router.group_best', 2),
]


def changed(cfg: T, path: str, value: object) -> T:
  """A config with another value at a dotted path."""
  name, _, rest = path.partition('.')
  return dataclasses.replace(
    cfg, **{name: changed(getattr(cfg, name), rest, value) if rest else value}
  )


@pytest.mark.parametrize(('kind', 'path', 'value'), HELD_NOWHERE)
def test_a_model_that_the_family_cannot_say_is_refused(kind: str, path: str, value: object) -> None:
  with pytest.raises(
    ConfigError, match=f'config.model.{path}=.* cannot be said in a config.json of model_type='
  ):
    config_json(FAMILIES[kind], changed(TINY[kind], path, value), {})


# ---- names


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
  # the same model, exported under the config that we write
  assert file_shapes(tensors(known.names, cfg, config_json(known, cfg, {}), shapes)) == file_shapes(
    parts
  )


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
  layer = 'model.layers.{}.mlp.gate.e_score_correction_bias'
  assert [tensor.name for tensor in parts['router.bias']] == [
    layer.format(i) for i in (1, 2, 3, 4, 5)
  ]
  assert [tensor.name for tensor in parts['dense_blocks.ffn.up']] == [
    'model.layers.0.mlp.up_proj.weight'
  ]
  assert parts['blocks.moe.experts.down'][9] == (
    'model.layers.2.mlp.experts.1.down_proj.weight',
    (1, 1),
    'transposed',
    (32, 20),
  )
  assert [tensor.name for tensor in parts['mtp.block.moe.router']] == [
    'model.layers.4.mlp.gate.weight',
    'model.layers.5.mlp.gate.weight',
  ]
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
  assert list(copies(dataclasses.replace(cfg, mtp_depth=1), leaves(cfg)).values()) == [
    'embed.table'
  ]


def test_what_files_do_not_hold_must_be_zero() -> None:
  pangu, bias = FAMILIES['pangu_ultra_moe'], 'router_enable_expert_bias'
  assert (
    must_be_zero(FAMILIES['mixtral'].names, {})
    == {'router.bias'}
    == must_be_zero(FAMILIES['llama'].names, {})
  )
  assert must_be_zero(FAMILIES['deepseek_v3'].names, {}) == set()
  assert (
    must_be_zero(pangu.names, {}) == {'router.bias'} == must_be_zero(pangu.names, {bias: False})
  )
  assert must_be_zero(pangu.names, {bias: True}) == set()
  assert not made_of('pangu_ultra_moe', TINY['pangu_ultra_moe'])['router.bias']
  assert [
    tensor.name
    for tensor in made_of('pangu_ultra_moe', TINY['pangu_ultra_moe'], **{bias: True})['router.bias']
  ] == [f'model.layers.{i}.mlp.e_score_correction_bias' for i in (1, 2, 3)]


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


# ---- the models themselves


@pytest.mark.slow
@pytest.mark.parametrize('kind', FAMILIES)
def test_the_tiny_preset_runs(kind: str) -> None:
  """Traced only: what it computes is held against goldens elsewhere."""
  cfg = TINY[kind]
  row = jax.ShapeDtypeStruct((2, 12), np.int32)

  def run(key: jax.Array, *fields: jax.Array) -> jax.Array:
    model, batch = Transformer(key, cfg), Batch(*fields)
    return model.logits(
      model(batch, np.zeros((cfg.num_moe_layers, cfg.moe.router.num_experts))).hidden
    )

  assert jax.eval_shape(run, jax.random.key(0), *[row] * len(Batch._fields)).shape == (
    2,
    12,
    cfg.vocab_size,
  )
