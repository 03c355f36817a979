"""Mixtral (2401.04088): eight experts in every layer, two a token, softmax over the two."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# Mixtral-8x7B-v0.1
FULL = ModelConfig(
  vocab_size=32000,
  d_model=4096,
  num_layers=32,
  norm_eps=1e-5,
  attention=AttentionConfig(num_heads=32, num_kv_heads=8, d_head=128, rope=RopeConfig(theta=1e6)),
  moe=MoEConfig(d_expert=14336, router=RouterConfig(num_experts=8, top_k=2)),
)

# Mixtral-8x22B-v0.1
MIXTRAL_8X22B = ModelConfig(
  vocab_size=32000,
  d_model=6144,
  num_layers=56,
  norm_eps=1e-5,
  attention=AttentionConfig(num_heads=48, num_kv_heads=8, d_head=128, rope=RopeConfig(theta=1e6)),
  moe=MoEConfig(d_expert=16384, router=RouterConfig(num_experts=8, top_k=2)),
)

TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=2,
  norm_eps=1e-5,
  attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=10, windows=(8,), rope=RopeConfig(theta=1e6)
  ),
  moe=MoEConfig(d_expert=56, router=RouterConfig(num_experts=4, top_k=2)),
)

MIXTRAL = Family(
  model_type='mixtral',
  architecture='MixtralForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    rope(theta=1e6),
    layer_keys.windows('every', 0),
    Key('intermediate_size', 'moe.d_expert', required=True),
    Key('num_local_experts', 'moe.router.num_experts', required=True),
    Key('num_experts_per_tok', 'moe.router.top_k', required=True),
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.NO_ROUTER_BIAS
  | tables.in_layers({'moe.router': 'block_sparse_moe.gate.weight'}, 'transposed')
  # gate, up and down
  | tables.ffn('moe.experts', 'block_sparse_moe.experts.{expert}', ('w1', 'w3', 'w2')),
  presets={'full': FULL, '8x22b': MIXTRAL_8X22B, 'tiny': TINY},
  aliases={'num_experts': 'num_local_experts'},
)
