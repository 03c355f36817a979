"""Rope in config.json: both spellings, YaRN with and without its keys."""

import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES, config_json
from tests.families.tiny_configs import TINY, changed, read, tiny
from tests.support.published_configs import PUBLISHED

PUBLISHED_IDS = [f'{kind}-{preset}' for kind, preset in PUBLISHED]


@pytest.mark.parametrize(('kind', 'preset'), PUBLISHED, ids=PUBLISHED_IDS)
def test_both_spellings_of_rope_are_one(kind: str, preset: str) -> None:
  older = PUBLISHED[kind, preset]
  moved = ('rope_theta', 'rope_scaling', 'partial_rotary_factor')
  newer = {name: value for name, value in older.items() if name not in moved}
  scaling = dict(older['rope_scaling'] if older.get('rope_scaling') else {'type': 'default'})
  kind_of_rope = scaling.pop('type', None) or scaling['rope_type']
  beside = {name: older[name] for name in ('rope_theta', 'partial_rotary_factor') if name in older}
  newer['rope_parameters'] = scaling | {'rope_type': kind_of_rope} | beside
  assert read(newer) == read(older)


def yarn(kind: str, **scaling: object) -> object:
  return read(tiny(kind, rope_scaling={'rope_type': 'yarn'} | scaling)).attention.rope.yarn


def test_yarn_without_a_length_or_a_factor() -> None:
  assert yarn('qwen3_moe', factor=4.0).original_length == 512
  assert yarn('qwen3_moe', original_max_position_embeddings=128).factor == 4.0
  nulls = {'attention_factor': None, 'mscale': None, 'truncate': None}
  assert yarn('qwen3_moe', factor=4.0, **nulls).truncate is True
  assert yarn('deepseek_v3', factor=4.0, mscale_all_dim=0.5).mscale_all_dim == 0.5
  assert yarn('gpt_oss', factor=8.0, original_max_position_embeddings=64).truncate is True
  scaling = {'type': 'yarn', 'factor': 2.0}
  with pytest.raises(ConfigError, match='max_position_embeddings is missing'):
    read(tiny('qwen3_moe', max_position_embeddings=..., rope_scaling=scaling))


def test_gpt_oss_has_yarn_unless_another_rope_is_said() -> None:
  bare = tiny('gpt_oss', rope_scaling=..., rope_theta=...)
  assert read(bare) == TINY['gpt_oss']
  assert read(bare | {'rope_theta': 10.0}) == changed(TINY['gpt_oss'], 'attention.rope.theta', 10.0)
  plain = read(bare | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 7.0}})
  assert plain.attention.rope.yarn.factor == 1.0 and plain.attention.rope.theta == 7.0
  assert read(config_json(FAMILIES['gpt_oss'], plain, {})) == plain
