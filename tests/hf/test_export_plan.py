"""What a model is published as: as it came, as the only family that can hold it, or not at all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data.special_tokens import SpecialTokens
from moejax.families import FAMILIES
from moejax.hf.export_plan import origin_of, plan_export, special_keys
from moejax.hf.import_model import run_config
from moejax.hf.spelling import export_outlook
from moejax.hf.weights import open_published
from moejax.model.config import ModelConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.train.experiment.config import ExperimentConfig
from tests.hf.round_trip import given_back, loaded
from tests.support.published_models import GOLDEN, arrays_in, copied, written

SAID = {'bos_token_id': 5, 'eos_token_id': 5}


def test_a_changed_model_is_written_anew(tmp_path: Path) -> None:
  """With what the old config.json says beside the model."""
  source = open_published(copied('mixtral', tmp_path / 'm'))
  changed = dataclasses.replace(source.cfg, norm_eps=1e-3)
  config = plan_export(run_config(changed, 'run'), origin_of(source), {}, '', '').config
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
  router = dataclasses.replace(source.cfg.moe.router, scale=2.0)
  moe = dataclasses.replace(source.cfg.moe, router=router)
  changed = run_config(dataclasses.replace(source.cfg, moe=moe), 'run')
  how = plan_export(changed, origin_of(source), {}, '', '')
  assert how.config != config and len(how.made_of['router.bias']) == 3


def test_the_only_family_that_can_hold_a_model_is_found() -> None:
  for kind, known in FAMILIES.items():
    cfg = ExperimentConfig(model=known.presets['tiny'], seq_len=77)
    how = plan_export(cfg, None, SAID, kind, '')
    assert how.config['model_type'] == kind and {*how.dtypes.values()} == {'F32'}
    assert how.config['torch_dtype'] == 'float32' and how.config['bos_token_id'] == 5
    assert how.generation_config == {'bos_token_id': 5, 'eos_token_id': 5}
    assert len(how.copies) == 2 * cfg.model.mtp_depth
  assert plan_export(cfg, None, SAID, '', '').config == how.config
  assert plan_export(cfg, None, {}, '', '').generation_config == {}
  deepseek = ExperimentConfig(model=FAMILIES['deepseek_v3'].presets['tiny'], seq_len=77)
  yarn = plan_export(deepseek, None, {}, '', 'bfloat16')
  assert yarn.config['max_position_embeddings'] == 256
  assert how.config['max_position_embeddings'] == 77
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
    plan_export(odd, None, {}, '', '')
  with pytest.raises(ConfigError, match='this family cannot(.|\n)*  llama: ') as error:
    plan_export(odd, None, {}, 'llama', '')
  assert 'mixtral' not in str(error.value)
  plain = dataclasses.replace(FAMILIES['llama'].presets['tiny'])
  with pytest.raises(ConfigError, match='as llama or mistral or mixtral: choose one with --family'):
    plan_export(ExperimentConfig(model=plain), None, {}, '', '')
  with pytest.raises(
    ConfigError, match=r"--family='gpt' is not one of (.|\n)*--dtype='int8' is not one of"
  ):
    plan_export(odd, None, {}, 'gpt', 'int8')


def test_what_no_family_can_hold_is_told_before_a_run() -> None:
  def outlook(kind: str, rule: str, **changes: object) -> str:
    model = dataclasses.replace(FAMILIES[kind].presets['tiny'], vocab_size=0, **changes)
    return export_outlook(ExperimentConfig(model=model, balance=BalanceConfig(bias_rule=rule)))

  assert 'as deepseek_v3, by python -m moejax.hf export' in outlook('deepseek_v3', 'sign')
  assert 'as mixtral, by' in outlook('mixtral', '')
  assert "mixtral could hold this model, but for the bias that balance.bias_rule='sign'" in outlook(
    'mixtral', 'sign'
  )
  told = outlook('mixtral', '', num_dense_layers=1, d_ff=8)
  assert 'no published family can hold this model; the nearest is ' in told


def test_a_model_that_was_trained_on_keeps_what_its_publisher_says(tmp_path: Path) -> None:
  """In float32, and with the length of the rows that it has read since, where that is more."""
  source = open_published(copied('mixtral', tmp_path / 'm'))
  origin = origin_of(source)._replace(dtype='BF16')
  trained = dataclasses.replace(run_config(source.cfg, 'run'), steps=3, seq_len=8)
  how = plan_export(trained, origin, {}, '', '')
  assert how.config == source.config | {
    key: 'float32' for key in ('dtype', 'torch_dtype') if key in source.config
  }
  assert {*how.dtypes.values()} == {'F32'}
  longer = dataclasses.replace(trained, seq_len=1 << 20)
  longest = plan_export(longer, origin, {}, '', '').config['max_position_embeddings']
  assert longest == 1 << 20 > source.config['max_position_embeddings']
  upcycled = dataclasses.replace(trained, model=FAMILIES['qwen3_moe'].presets['tiny'])
  said = special_keys(SpecialTokens(True, 1, (3, 2), -1, 4096), 2)
  config = plan_export(upcycled, origin, said, '', '').config
  assert config['model_type'] == 'qwen3_moe' and config['bos_token_id'] == 1
  assert config['eos_token_id'] == [3, 2] and config['max_position_embeddings'] == 4096
