"""gpt-oss (2508.10925): sinks, a window in every other layer, biases, a clamped activation."""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Fixed, Key, equal_heads
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

ROPE = RopeConfig(theta=150_000.0, yarn=YarnConfig(factor=32.0, truncate=False))
ATTENTION = AttentionConfig(
  num_heads=64,
  num_kv_heads=8,
  d_head=64,
  windows=(128, 0),
  qkv_bias=True,
  out_bias=True,
  sinks=True,
  rope=ROPE,
)

# gpt-oss-120b
FULL = ModelConfig(
  vocab_size=201088,
  d_model=2880,
  num_layers=36,
  norm_eps=1e-5,
  attention=ATTENTION,
  moe=MoEConfig(
    d_expert=2880,
    activation='clamped_swiglu',
    expert_bias=True,
    router=RouterConfig(num_experts=128, top_k=4, weigh='softmax', logit_bias=True),
  ),
)

# gpt-oss-20b: fewer layers and experts.
GPT_OSS_20B = ModelConfig(
  vocab_size=201088,
  d_model=2880,
  num_layers=24,
  norm_eps=1e-5,
  attention=ATTENTION,
  moe=MoEConfig(
    d_expert=2880,
    activation='clamped_swiglu',
    expert_bias=True,
    router=RouterConfig(num_experts=32, top_k=4, weigh='softmax', logit_bias=True),
  ),
)

TINY = ModelConfig(
  vocab_size=96,
  d_model=32,
  num_layers=4,
  norm_eps=1e-5,
  attention=AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    d_head=10,
    windows=(8, 0),
    qkv_bias=True,
    out_bias=True,
    sinks=True,
    rope=ROPE,
  ),
  moe=MoEConfig(
    d_expert=20,
    activation='clamped_swiglu',
    expert_bias=True,
    router=RouterConfig(num_experts=8, top_k=3, weigh='softmax', logit_bias=True),
  ),
)

GPT_OSS = Family(
  model_type='gpt_oss',
  architecture='GptOssForCausalLM',
  base=FULL,
  keys=(
    *tables.DECODER,
    *tables.KV_HEADS,
    Key('head_dim', 'attention.d_head', required=True, empty=equal_heads),
    *tables.ATTENTION_BIAS,
    layer_keys.windows('alternate', 128),
    # Its config.json may leave out rope altogether, and means this YaRN then.
    rope(
      theta=150_000.0,
      rope_type='yarn',
      factor=32.0,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=False,
      original_max_position_embeddings=4096,
    ),
    Key('intermediate_size', 'moe.d_expert', required=True),
    Key('num_local_experts', 'moe.router.num_experts', required=True),
    Key('num_experts_per_tok', 'moe.router.top_k', required=True),
    Key('swiglu_limit', 'moe.activation_limit'),
    Fixed('swiglu_alpha', 1.702),  # of the clamped activation, a constant here
  ),
  names=tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.NO_ROUTER_BIAS
  | tables.in_layers({'moe.router': 'mlp.router.weight'}, 'transposed')
  | tables.in_layers(
    {
      'moe.router_logit_bias': 'mlp.router.bias',
      'attention.sinks': 'self_attn.sinks',
      'moe.experts.down': 'mlp.experts.down_proj',
      'moe.experts.down_bias': 'mlp.experts.down_proj_bias',
    }
  )
  # Gate and up are one tensor: the even columns are the gate's, the odd ones up's.
  | tables.in_layers(
    {
      'moe.experts.gate': 'mlp.experts.gate_up_proj',
      'moe.experts.gate_bias': 'mlp.experts.gate_up_proj_bias',
    },
    'even',
  )
  | tables.in_layers(
    {
      'moe.experts.up': 'mlp.experts.gate_up_proj',
      'moe.experts.up_bias': 'mlp.experts.gate_up_proj_bias',
    },
    'odd',
  ),
  presets={'full': FULL, '20b': GPT_OSS_20B, 'tiny': TINY},
  aliases={'num_experts': 'num_local_experts', 'experts_per_token': 'num_experts_per_tok'},
)
