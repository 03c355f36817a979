"""OLMoE (2409.02060): 64 experts, eight a token, softmax over all; norms over all of q and of k."""

from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# OLMoE-1B-7B-0924
FULL = ModelConfig(
  vocab_size=50304,
  d_model=2048,
  num_layers=16,
  norm_eps=1e-5,
  attention=AttentionConfig(num_heads=16, num_kv_heads=16, d_head=128, qk_norm='projection'),
  moe=MoEConfig(d_expert=1024, router=RouterConfig(num_experts=64, top_k=8, renormalise=False)),
)

TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=2,
  norm_eps=1e-5,
  attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=8, qk_norm='projection', clip_qkv=1.5
  ),
  moe=MoEConfig(d_expert=20, router=RouterConfig(num_experts=8, top_k=3, renormalise=False)),
)

OLMOE = Family(
  model_type='olmoe',
  architecture='OlmoeForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS_OR_ALL,
    *tables.HEAD_DIM,
    *tables.ATTENTION_BIAS,
    rope(),
    Key('clip_qkv', 'attention.clip_qkv', empty=0.0),
    Key('intermediate_size', 'moe.d_expert', required=True),
    Key('num_experts', 'moe.router.num_experts', required=True),
    Key('num_experts_per_tok', 'moe.router.top_k', required=True),
    Key('norm_topk_prob', 'moe.router.renormalise'),
  ),
  names=tables.MODEL | tables.NORMS | tables.GROUPED | tables.MOE | tables.NO_ROUTER_BIAS,
  presets={'full': FULL, 'tiny': TINY},
  aliases={'num_local_experts': 'num_experts'},
)
