"""DeepSeek-V3 and R1 (2412.19437): latent attention, sigmoid router with groups and a bias, MTP."""

from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Key
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.families.schema.tensor_names import Name
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

# The norms of the latent vectors have an eps of their own, 1e-6, that no config.json says.
FULL = ModelConfig(
  vocab_size=129280,
  d_model=7168,
  num_layers=61,
  num_dense_layers=3,
  d_ff=18432,
  norm_eps=1e-6,
  mtp_depth=1,
  attention=AttentionConfig(
    num_heads=128,
    num_kv_heads=128,
    d_head=128,
    latent=LatentConfig(kv_rank=512, q_rank=1536, d_rope=64, d_value=128, norm_eps=1e-6),
    rope=RopeConfig(interleaved=True, yarn=YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)),
  ),
  moe=MoEConfig(
    d_expert=2048,
    num_shared=1,
    router=RouterConfig(
      num_experts=256, top_k=8, score_fn='sigmoid', num_groups=8, top_groups=4, scale=2.5
    ),
  ),
)

TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=3,
  num_dense_layers=1,
  d_ff=56,
  norm_eps=1e-6,
  mtp_depth=1,
  attention=AttentionConfig(
    num_heads=4,
    num_kv_heads=4,
    d_head=10,
    latent=LatentConfig(kv_rank=16, q_rank=24, d_rope=8, d_value=12, norm_eps=1e-6),
    rope=RopeConfig(
      interleaved=True,
      yarn=YarnConfig(factor=4.0, original_length=64, mscale=1.0, mscale_all_dim=1.0),
    ),
  ),
  moe=MoEConfig(
    d_expert=20,
    num_shared=1,
    router=RouterConfig(
      num_experts=8, top_k=3, score_fn='sigmoid', num_groups=4, top_groups=2, scale=2.5
    ),
  ),
)

DEEPSEEK_V3 = Family(
  model_type='deepseek_v3',
  architecture='DeepseekV3ForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    *tables.LATENT_WIDTHS,
    *tables.ATTENTION_BIAS,
    Key('rope_interleave', 'attention.rope.interleaved'),
    rope(softmax_scaled=True),
    *tables.DEEPSEEK_MOE,
    *tables.SIGMOID_ROUTER,
    *tables.MTP_DEPTH,
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.LATENT
  | tables.DENSE_FFN
  | tables.MOE
  | tables.SHARED
  | tables.MTP_NAMES
  | {'router.bias': Name('model.layers.{layer}.mlp.gate.e_score_correction_bias')},
  presets={'full': FULL, 'tiny': TINY},
  aliases={'num_local_experts': 'n_routed_experts', 'num_mtp_layers': 'num_nextn_predict_layers'},
)
