"""openPangu-Ultra-MoE-718B (2505.04519): DeepSeek-V3 with four norms a layer, no groups, no bias.

Two spellings of config.json are read, the original and DeepSeek's, which vLLM loads and which is
written.
"""

from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Fixed, Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.families.schema.tensor_names import Name
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# The eps of the latent norms is rms_norm_eps in Huawei's two serving codes, and 1e-6 in its pull
# request to transformers; config.json does not say. No release was seen that would settle it.
FULL = ModelConfig(
  vocab_size=153600,
  d_model=7680,
  num_layers=61,
  num_dense_layers=3,
  d_ff=18432,
  norm_eps=1e-5,
  mtp_depth=1,
  sandwich_norm=True,
  attention=AttentionConfig(
    num_heads=128,
    num_kv_heads=128,
    d_head=128,
    rope=RopeConfig(theta=25.6e6, interleaved=True),
    latent=LatentConfig(kv_rank=512, q_rank=1536, d_rope=64, d_value=128, norm_eps=1e-5),
  ),
  moe=MoEConfig(
    d_expert=2048,
    num_shared=1,
    router=RouterConfig(num_experts=256, top_k=8, score_fn='sigmoid', scale=2.5),
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
  sandwich_norm=True,
  attention=AttentionConfig(
    num_heads=4,
    num_kv_heads=4,
    d_head=10,
    rope=RopeConfig(theta=25.6e6, interleaved=True),
    latent=LatentConfig(kv_rank=16, q_rank=24, d_rope=8, d_value=12, norm_eps=1e-5),
  ),
  moe=MoEConfig(
    d_expert=20,
    num_shared=1,
    router=RouterConfig(num_experts=8, top_k=3, score_fn='sigmoid', scale=2.5),
  ),
)

OPENPANGU_ULTRA_MOE = Family(
  model_type='pangu_ultra_moe',
  architecture='PanguUltraMoEForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.LATENT_WIDTHS,
    *tables.ATTENTION_BIAS,
    Key('rms_norm_eps', 'attention.latent.norm_eps', required=True),
    Key('rope_interleave', 'attention.rope.interleaved'),
    rope(theta=25.6e6),
    Fixed(
      'sandwich_norm',
      True,
      "without it these are the layers of model_type='deepseek_v3'",
      required=True,
    ),
    *tables.DEEPSEEK_MOE,
    *tables.MTP_DEPTH,
    Key('norm_topk_prob', 'moe.router.renormalise'),
    Fixed('scoring_func', 'sigmoid'),
    Fixed('n_group', 1),
    Fixed('topk_group', 1),
  ),
  names=tables.MODEL
  | tables.SANDWICH_NORMS
  | tables.LATENT
  | tables.DENSE_FFN
  | tables.MOE
  | tables.SHARED
  | tables.MTP_NAMES
  | {
    'router.bias': Name(
      'model.layers.{layer}.mlp.e_score_correction_bias', key='router_enable_expert_bias'
    )
  },
  presets={'full': FULL, 'tiny': TINY},
  aliases={
    'num_dense_layers': 'first_k_dense_replace',
    'num_routed_experts': 'n_routed_experts',
    'num_shared_experts': 'n_shared_experts',
    'attention_q_lora_dim': 'q_lora_rank',
    'attention_kv_lora_dim': 'kv_lora_rank',
    'attention_qk_dim': 'qk_nope_head_dim',
    'attention_qk_rope_dim': 'qk_rope_head_dim',
    'attention_v_dim': 'v_head_dim',
    'num_mtp_layers': 'num_nextn_predict_layers',
  },
)
