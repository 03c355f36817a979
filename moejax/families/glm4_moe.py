"""GLM-4.5 (2508.06471): DeepSeek-V3's router; grouped-query attention that rotates half a head."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.families.schema.tensor_names import Name
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

ROPE = RopeConfig(theta=1e6, fraction=0.5)

# GLM-4.5
FULL = ModelConfig(
  vocab_size=151552,
  d_model=5120,
  num_layers=92,
  num_dense_layers=3,
  d_ff=12288,
  norm_eps=1e-5,
  mtp_depth=1,
  attention=AttentionConfig(
    num_heads=96, num_kv_heads=8, d_head=128, qk_norm='head', qkv_bias=True, rope=ROPE
  ),
  moe=MoEConfig(
    d_expert=1536,
    num_shared=1,
    router=RouterConfig(num_experts=160, top_k=8, score_fn='sigmoid', scale=2.5),
  ),
)

# GLM-4.5-Air: without norms on the heads of q and k.
AIR = ModelConfig(
  vocab_size=151552,
  d_model=4096,
  num_layers=46,
  num_dense_layers=1,
  d_ff=10944,
  norm_eps=1e-5,
  mtp_depth=1,
  attention=AttentionConfig(num_heads=96, num_kv_heads=8, d_head=128, qkv_bias=True, rope=ROPE),
  moe=MoEConfig(
    d_expert=1408, num_shared=1, router=RouterConfig(num_experts=128, top_k=8, score_fn='sigmoid')
  ),
)

TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=3,
  num_dense_layers=1,
  d_ff=56,
  norm_eps=1e-5,
  mtp_depth=1,
  attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=12, qk_norm='head', qkv_bias=True, rope=ROPE
  ),
  moe=MoEConfig(
    d_expert=20,
    num_shared=1,
    router=RouterConfig(num_experts=8, top_k=3, score_fn='sigmoid', scale=2.5),
  ),
)

GLM4_MOE = Family(
  model_type='glm4_moe',
  architecture='Glm4MoeForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    # Of q, k and v only; the same key of DeepSeek means the output projection, too.
    Key('attention_bias', 'attention.qkv_bias', required=True),
    layer_keys.choice('use_qk_norm', 'attention.qk_norm', {True: 'head', False: ''}),
    rope(fraction=0.5),
    *tables.DEEPSEEK_MOE,
    *tables.SIGMOID_ROUTER,
    *tables.MTP_DEPTH,
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.DENSE_FFN
  | tables.MOE
  | tables.SHARED
  | tables.MTP_NAMES
  | {'router.bias': Name('model.layers.{layer}.mlp.gate.e_score_correction_bias')},
  presets={'full': FULL, 'air': AIR, 'tiny': TINY},
  aliases={'num_local_experts': 'n_routed_experts', 'num_mtp_layers': 'num_nextn_predict_layers'},
)
