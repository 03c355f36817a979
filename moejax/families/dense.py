"""Llama, Mistral, Qwen2 and Qwen3 as a mixture of one expert, which every token sees with weight 1.

So they are read, run, written and upcycled like the rest; only a router that chooses nothing is
beside their weights.
"""

from moejax.families.schema import layer_keys
from moejax.families.schema import shared_rows as tables
from moejax.families.schema.config_keys import Codec, Fixed, Key, equal_heads
from moejax.families.schema.family import Family
from moejax.families.schema.rope_keys import rope
from moejax.families.schema.tensor_names import Name
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.rope import RopeConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

ONE = RouterConfig(num_experts=1, top_k=1)
NAMES = (
  tables.MODEL
  | tables.NORMS
  | tables.GROUPED
  | tables.NO_ROUTER_BIAS
  | tables.ffn('moe.experts', 'mlp')
  | {'moe.router': Name('', 'unread')}
)
KEYS = (*tables.DECODER, Key('intermediate_size', 'moe.d_expert', required=True))


def dense(
  model_type: str,
  architecture: str,
  *,
  full: ModelConfig,
  tiny_attention: AttentionConfig,
  keys: tuple[Key | Fixed | Codec, ...],
) -> Family:
  """Returns a family of dense models.

  Args:
    model_type: of config.json.
    architecture: transformers' class.
    full: its published size.
    tiny_attention: of its tiny preset.
    keys: those beside the ones that all dense families have.
  """
  tiny = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=2,
    norm_eps=full.norm_eps,
    attention=tiny_attention,
    moe=MoEConfig(d_expert=56, router=ONE),
  )
  return Family(
    model_type=model_type,
    architecture=architecture,
    base=full,
    keys=KEYS + keys,
    names=NAMES,
    presets={'full': full, 'tiny': tiny},
  )


# Llama-2-7B
LLAMA = dense(
  'llama',
  'LlamaForCausalLM',
  full=ModelConfig(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    norm_eps=1e-5,
    attention=AttentionConfig(num_heads=32, num_kv_heads=32, d_head=128),
    moe=MoEConfig(d_expert=11008, router=ONE),
  ),
  tiny_attention=AttentionConfig(num_heads=4, num_kv_heads=2, d_head=10),
  keys=(
    *tables.KV_HEADS_OR_ALL,
    *tables.HEAD_DIM,
    *tables.ATTENTION_BIAS,
    rope(),
    Fixed('mlp_bias', False),
  ),
)

# Mistral-7B-v0.1
MISTRAL = dense(
  'mistral',
  'MistralForCausalLM',
  full=ModelConfig(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    norm_eps=1e-5,
    attention=AttentionConfig(num_heads=32, num_kv_heads=8, d_head=128, windows=(4096,)),
    moe=MoEConfig(d_expert=14336, router=ONE),
  ),
  tiny_attention=AttentionConfig(num_heads=4, num_kv_heads=2, d_head=10, windows=(8,)),
  keys=(
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    rope(),
    layer_keys.windows('every', 4096),
  ),
)

# Qwen2.5-7B
QWEN2 = dense(
  'qwen2',
  'Qwen2ForCausalLM',
  full=ModelConfig(
    vocab_size=152064,
    d_model=3584,
    num_layers=28,
    norm_eps=1e-6,
    attention=AttentionConfig(
      num_heads=28, num_kv_heads=4, d_head=128, qkv_bias=True, rope=RopeConfig(theta=1e6)
    ),
    moe=MoEConfig(d_expert=18944, router=ONE),
  ),
  tiny_attention=AttentionConfig(
    num_heads=4, num_kv_heads=2, d_head=8, qkv_bias=True, windows=(0, 8)
  ),
  keys=(
    *tables.KV_HEADS,
    *tables.HEAD_DIM,
    rope(),
    layer_keys.windows('last', 4096, switch=True),
  ),
)

# Qwen3-8B
QWEN3 = dense(
  'qwen3',
  'Qwen3ForCausalLM',
  full=ModelConfig(
    vocab_size=151936,
    d_model=4096,
    num_layers=36,
    norm_eps=1e-6,
    attention=AttentionConfig(
      num_heads=32, num_kv_heads=8, d_head=128, qk_norm='head', rope=RopeConfig(theta=1e6)
    ),
    moe=MoEConfig(d_expert=12288, router=ONE),
  ),
  tiny_attention=AttentionConfig(num_heads=4, num_kv_heads=2, d_head=10, qk_norm='head'),
  keys=(
    *tables.KV_HEADS,
    Key('head_dim', 'attention.d_head', required=True, empty=equal_heads),
    *tables.ATTENTION_BIAS,
    rope(),
    layer_keys.windows('last', 4096, switch=True),
  ),
)
