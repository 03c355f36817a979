"""Qwen3-MoE (2505.09388): 128 experts, eight a token, softmax over these; norms of q, k heads."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# Qwen3-30B-A3B. No layer is dense, and none reads d_ff, which config.json has nevertheless.
FULL = ModelConfig(
  vocab_size=151936,
  d_model=2048,
  num_layers=48,
  d_ff=6144,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=32, num_kv_heads=4, d_head=128, qk_norm='head', rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(d_expert=768, router=RouterConfig(num_experts=128, top_k=8)),
)

# Qwen3-235B-A22B
QWEN3_235B_A22B = ModelConfig(
  vocab_size=151936,
  d_model=4096,
  num_layers=94,
  d_ff=12288,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=64, num_kv_heads=4, d_head=128, qk_norm='head', rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(d_expert=1536, router=RouterConfig(num_experts=128, top_k=8)),
)

# With layers between that have no experts, which the published sizes have not.
TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=4,
  num_dense_layers=1,
  ffn_pattern=('moe', 'dense'),
  d_ff=56,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=10, qk_norm='head', rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(d_expert=20, router=RouterConfig(num_experts=8, top_k=3)),
)

QWEN3_MOE = Family(
  model_type='qwen3_moe',
  architecture='Qwen3MoeForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    *tables.ATTENTION_BIAS,
    rope(),
    layer_keys.windows('every', 4096, switch=True),
    *tables.QWEN_MOE,
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.DENSE_FFN
  | tables.MOE
  | tables.NO_ROUTER_BIAS,
  presets={'full': FULL, '235b_a22b': QWEN3_235B_A22B, 'tiny': TINY},
  aliases={'num_local_experts': 'num_experts'},
)
