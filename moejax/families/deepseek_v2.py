"""DeepSeek-V2 (2405.04434): latent attention; softmax over all experts, groups by their best."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Fixed
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

ROPE = RopeConfig(
  interleaved=True, yarn=YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)
)

# DeepSeek-V2. Routing weights are not renormalised, but scaled.
FULL = ModelConfig(
  vocab_size=102400,
  d_model=5120,
  num_layers=60,
  num_dense_layers=1,
  d_ff=12288,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=128,
    num_kv_heads=128,
    d_head=128,
    rope=ROPE,
    latent=LatentConfig(kv_rank=512, q_rank=1536, d_rope=64, d_value=128, norm_eps=1e-6),
  ),
  moe=MoEConfig(
    d_expert=1536,
    num_shared=2,
    router=RouterConfig(
      num_experts=160,
      top_k=6,
      num_groups=8,
      top_groups=3,
      group_best=1,
      renormalise=False,
      scale=16.0,
    ),
  ),
)

# DeepSeek-V2-Lite: queries are not compressed, and experts are not in groups.
LITE = ModelConfig(
  vocab_size=102400,
  d_model=2048,
  num_layers=27,
  num_dense_layers=1,
  d_ff=10944,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=16,
    num_kv_heads=16,
    d_head=128,
    rope=ROPE,
    latent=LatentConfig(kv_rank=512, d_rope=64, d_value=128, norm_eps=1e-6),
  ),
  moe=MoEConfig(
    d_expert=1408,
    num_shared=2,
    router=RouterConfig(num_experts=64, top_k=6, group_best=1, renormalise=False),
  ),
)

# With every feature of the family: compressed queries, groups, a dense layer, shared experts.
TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=3,
  num_dense_layers=1,
  d_ff=56,
  norm_eps=1e-6,
  attention=AttentionConfig(
    num_heads=4,
    num_kv_heads=4,
    d_head=10,
    rope=ROPE,
    latent=LatentConfig(kv_rank=16, q_rank=24, d_rope=8, d_value=12, norm_eps=1e-6),
  ),
  moe=MoEConfig(
    d_expert=20,
    num_shared=2,
    router=RouterConfig(
      num_experts=8, top_k=3, num_groups=4, top_groups=2, group_best=1, renormalise=False, scale=4.0
    ),
  ),
)

DEEPSEEK_V2 = Family(
  model_type='deepseek_v2',
  architecture='DeepseekV2ForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS_OR_ALL,
    *tables.LATENT_WIDTHS,
    *tables.ATTENTION_BIAS,
    Fixed('mlp_bias', False),
    rope(softmax_scaled=True),
    *tables.DEEPSEEK_MOE,
    # Which of the two routers it is; n_group is looked at by one of them only.
    layer_keys.groups_by_method(),
    Fixed('norm_topk_prob', False),
    Fixed('scoring_func', 'softmax'),
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.LATENT
  | tables.DENSE_FFN
  | tables.MOE
  | tables.SHARED
  | tables.NO_ROUTER_BIAS,
  presets={'full': FULL, 'lite': LITE, 'tiny': TINY},
  aliases={'num_experts': 'n_routed_experts'},
)
