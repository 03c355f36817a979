"""config.json to our config and back: what keys may say, and what is refused with a remedy."""

import dataclasses

import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES, config_json, model_config
from tests.families.schema.bad_configs import BAD
from tests.families.tiny_configs import TINY, changed, read, tiny
from tests.support.published_configs import PUBLISHED

# The original spelling of openPangu, from the configuration class of Huawei's pull request to
# transformers.
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


def test_what_the_file_does_not_say_is_not_lost_and_not_asked() -> None:
  cfg = dataclasses.replace(TINY['mixtral'], dtype='bfloat16', remat='full', unroll=2, d_ff=77)
  assert read(config_json(FAMILIES['mixtral'], cfg, {})) == TINY['mixtral']


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
  every = read(tiny('qwen3_moe', mlp_only_layers=None, decoder_sparse_step=...))
  assert every.has_experts == (True,) * 4


@pytest.mark.parametrize(('kind', 'said', 'message'), BAD)
def test_a_bad_config_says_what_and_what_instead(kind: str, said: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=f'^config.json: {message}'):
    read(tiny(kind, **said))


def test_what_is_off_is_as_good_as_absent() -> None:
  off = tiny('pangu_ultra_moe', use_mhc=False, param_sink_number=0, swa_layers=[])
  assert read(off) == TINY['pangu_ultra_moe']


def test_all_problems_are_told_at_once() -> None:
  scaling = {'type': 'linear', 'factor': 2}
  with pytest.raises(ConfigError) as error:
    read(tiny('mixtral', hidden_act='gelu', vocab_size=..., rope_scaling=scaling))
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
  ('deepseek_v3', 'ffn_pattern', ('moe', 'dense')),
  ('mixtral', 'ffn_pattern', ('moe', 'dense')),
  ('deepseek_v3', 'moe.d_shared', 7),
  ('qwen3_moe', 'moe.num_shared', 1),
  ('qwen2_moe', 'moe.shared_gate', False),
  ('mixtral', 'moe.router.renormalise', False),
  ('deepseek_v2', 'moe.router.group_best', 2),
]


@pytest.mark.parametrize(('kind', 'path', 'value'), HELD_NOWHERE)
def test_a_model_that_the_family_cannot_say_is_refused(kind: str, path: str, value: object) -> None:
  with pytest.raises(
    ConfigError, match=f'config.model.{path}=.* cannot be said in a config.json of model_type='
  ):
    config_json(FAMILIES[kind], changed(TINY[kind], path, value), {})
