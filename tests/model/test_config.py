"""What a model cannot be is one clear error, with all that is wrong."""

import pytest

from moejax.config import ConfigError
from moejax.model.config import INIT_RULES, AttentionConfig, InitConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig


def problems(cfg: type, **fields: object) -> list[str]:
  with pytest.raises(ConfigError) as error:
    cfg(**fields)
  return [problem.split(':')[0] for problem in error.value.problems]


def test_an_attention_config_that_cannot_be_is_one_clear_error() -> None:
  assert problems(
    AttentionConfig,
    num_heads=3,
    num_kv_heads=2,
    d_head=5,
    implementation='flash',
    windows=(4, -1),
    qk_norm='all',
    clip_qkv=-1.0,
  ) == [
    'num_kv_heads=2 does not divide num_heads=3',
    "implementation='flash' is not one of ['auto', 'chunked', 'cudnn', 'splash', 'xla']",
    'windows=(4, -1)',
    "qk_norm='all' is not one of ['', 'head', 'projection']",
    'clip_qkv=-1.0',
    'd_head=5 * rope.fraction=1.0 = 5 channels to rotate',
  ]
  assert problems(AttentionConfig, num_kv_heads=0, windows=()) == ['num_kv_heads=0', 'windows=()']
  assert problems(AttentionConfig, d_head=6, rope=RopeConfig(fraction=0.5)) == [
    'd_head=6 * rope.fraction=0.5 = 3 channels to rotate'
  ]
  assert problems(LatentConfig, kv_rank=-1, q_rank=-2, d_rope=3, d_value=0, norm_eps=0.0) == [
    'kv_rank=-1',
    'q_rank=-2',
    'd_rope=3',
    'd_value=0',
    'norm_eps=0.0',
  ]


def test_latent_attention_refuses_what_it_has_no_equation_for() -> None:
  AttentionConfig(d_head=5, latent=LatentConfig(8))  # its d_head is not rotated
  assert problems(
    AttentionConfig,
    num_kv_heads=2,
    rope=RopeConfig(fraction=0.5),
    qk_norm='head',
    clip_qkv=8.0,
    sinks=True,
    latent=LatentConfig(8),
  ) == ['num_kv_heads=2', "qk_norm='head'", 'clip_qkv=8.0', 'sinks=True', 'rope.fraction=0.5']


def test_a_model_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    ModelConfig(
      vocab_size=-1,
      d_model=0,
      num_layers=2,
      num_dense_layers=2,
      d_ff=0,
      norm_eps=0.0,
      mtp_depth=-1,
      init=InitConfig(ffn_gain=0.4),
      dtype='float16',
      remat='some',
      unroll=0,
    )
  assert [problem.split(':')[0] for problem in error.value.problems] == [
    'vocab_size=-1',
    'd_model=0',
    'd_ff=0',
    'unroll=0',
    'num_dense_layers=2',
    'norm_eps=0.0',
    'mtp_depth=-1',
    "init.ffn_gain=0.4 is for the norm of a branch's output",
    "dtype='float16' is not one of ['bfloat16', 'float32']",
    "remat='some' is not one of "
    "['all_but_attention', 'attention', 'dots', 'experts', 'full', 'none']",
  ]


def test_initial_weights_that_cannot_be_are_one_clear_error() -> None:
  assert problems(
    InitConfig, std=0.0, rule='some', embed_std=-1.0, attention_gain=-0.5, ffn_gain=-2.0
  ) == [
    'std=0.0',
    "rule='some' is not one of ['depth', 'normal', 'tiny']",
    'embed_std=-1.0',
    'attention_gain=-0.5',
    'ffn_gain=-2.0',
  ]


def test_each_rule_gives_its_two_standard_deviations() -> None:
  """Of what reads the residual, and of what writes to it."""
  d_model, layers = 64, 8
  assert INIT_RULES['normal'](0.3, d_model, layers) == (0.3, 0.3)
  assert INIT_RULES['depth'](0.3, d_model, layers) == (0.3, pytest.approx(0.3 / 4))
  tiny = pytest.approx(1 / 32)
  assert INIT_RULES['tiny'](0.3, d_model, layers) == (tiny, tiny)
