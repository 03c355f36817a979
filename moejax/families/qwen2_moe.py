"""Qwen2-MoE (2407.10671): softmax over all experts; biases on q, k, v; a gate on shared experts."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# Qwen1.5-MoE-A2.7B
FULL = ModelConfig(
  vocab_size=151936,
  d_model=2048,
  num_layers=24,
  d_ff=5632,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=16, num_kv_heads=16, d_head=128, qkv_bias=True, rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(
    d_expert=1408,
    num_shared=4,
    shared_gate=True,
    router=RouterConfig(num_experts=60, top_k=4, renormalise=False),
  ),
)

# Qwen2-57B-A14B
QWEN2_57B_A14B = ModelConfig(
  vocab_size=151936,
  d_model=3584,
  num_layers=28,
  d_ff=18944,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=28, num_kv_heads=4, d_head=128, qkv_bias=True, rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(
    d_expert=2560,
    num_shared=8,
    shared_gate=True,
    router=RouterConfig(num_experts=64, top_k=8, renormalise=False),
  ),
)

# With a shared expert that is no multiple of a routed one, which the published sizes have not.
TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=2,
  d_ff=56,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=8, qkv_bias=True, windows=(8, 0), rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(
    d_expert=20,
    num_shared=1,
    d_shared=27,
    shared_gate=True,
    router=RouterConfig(num_experts=8, top_k=3, renormalise=False),
  ),
)

QWEN2_MOE = Family(
  model_type='qwen2_moe',
  architecture='Qwen2MoeForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    Key('qkv_bias', 'attention.qkv_bias'),
    rope(),
    layer_keys.windows('alternate_first', 4096, switch=True),
    *tables.QWEN_MOE,
    layer_keys.shared_width(),
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.DENSE_FFN
  | tables.MOE
  | tables.NO_ROUTER_BIAS
  | tables.ffn('moe.shared', 'mlp.shared_expert')
  | tables.in_layers({'moe.shared_gate': 'mlp.shared_expert_gate.weight'}, 'transposed'),
  presets={'full': FULL, '57b_a14b': QWEN2_57B_A14B, 'tiny': TINY},
  aliases={'num_local_experts': 'num_experts'},
)
