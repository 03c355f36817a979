"""Rows that families share: most of them spell a layer as Llama does, or as DeepSeek.

The rows are of tables of keys and of tables of names.

A family's tables are sums of these and of its own rows; names whose parameter a model does not have
are not used.
"""

from collections.abc import Iterable, Mapping

from moejax.families.schema.config_keys import Fixed, Key, equal_heads, number_of_heads
from moejax.families.schema.layer_keys import latent_width, sparse_layers
from moejax.families.schema.tensor_names import Name

DECODER = (
  Fixed('hidden_act', 'silu'),
  Key('vocab_size', 'vocab_size', required=True),
  Key('hidden_size', 'd_model', required=True),
  Key('num_hidden_layers', 'num_layers', required=True),
  Key('num_attention_heads', 'attention.num_heads', required=True),
  Key('rms_norm_eps', 'norm_eps', required=True),
  Key('tie_word_embeddings', 'tie_embeddings'),
  Key('initializer_range', 'init.std'),
)
# Without num_key_value_heads: an error in some families, multi-head attention in others.
KV_HEADS = (
  Key('num_key_value_heads', 'attention.num_kv_heads', required=True, empty=number_of_heads),
)
KV_HEADS_OR_ALL = (Key('num_key_value_heads', 'attention.num_kv_heads', empty=number_of_heads),)
HEAD_DIM = (Key('head_dim', 'attention.d_head', empty=equal_heads),)
# One key for both: DeepSeek and Llama have a bias on all four projections, or on none.
ATTENTION_BIAS = (
  Key('attention_bias', 'attention.qkv_bias'),
  Key('attention_bias', 'attention.out_bias'),
)
LATENT_WIDTHS = (
  Key('q_lora_rank', 'attention.latent.q_rank', required=True, empty=0),
  Key('kv_lora_rank', 'attention.latent.kv_rank', required=True),
  Key('qk_nope_head_dim', 'attention.d_head', required=True),
  Key('qk_rope_head_dim', 'attention.latent.d_rope', required=True),
  Key('v_head_dim', 'attention.latent.d_value', required=True),
  latent_width(),
)
DEEPSEEK_MOE = (
  Key('intermediate_size', 'd_ff', required=True),
  Key('moe_intermediate_size', 'moe.d_expert', required=True),
  Key('n_routed_experts', 'moe.router.num_experts', required=True),
  Key('n_shared_experts', 'moe.num_shared'),
  Key('num_experts_per_tok', 'moe.router.top_k', required=True),
  Key('first_k_dense_replace', 'num_dense_layers', required=True),
  Key('routed_scaling_factor', 'moe.router.scale', required=True),
  Fixed('moe_layer_freq', 1, 'every layer after the dense ones has experts here'),
)
QWEN_MOE = (
  Key('intermediate_size', 'd_ff', required=True),
  Key('moe_intermediate_size', 'moe.d_expert', required=True),
  Key('num_experts', 'moe.router.num_experts', required=True),
  Key('num_experts_per_tok', 'moe.router.top_k', required=True),
  Key('norm_topk_prob', 'moe.router.renormalise', required=True),
  sparse_layers(),
)
SIGMOID_ROUTER = (
  Key('norm_topk_prob', 'moe.router.renormalise'),
  Fixed('scoring_func', 'sigmoid'),
  Fixed('topk_method', 'noaux_tc'),
  Key('n_group', 'moe.router.num_groups'),
  Key('topk_group', 'moe.router.top_groups'),
)
MTP_DEPTH = (Key('num_nextn_predict_layers', 'mtp_depth'),)

_LAYER = 'model.layers.{layer}.'


def in_layers(names: Mapping[str, str], how: str = 'same') -> dict[str, Name]:
  """Returns rows of a name table, of path -> published name within the layer."""
  return {path: Name(_LAYER + name, how) for path, name in names.items()}


def ffn(
  path: str, where: str, projections: Iterable[str] = ('gate_proj', 'up_proj', 'down_proj')
) -> dict[str, Name]:
  """Returns rows of the three matrices of an FFN.

  Args:
    path: of the FFN in our model.
    where: of the FFN in published files, within the layer.
    projections: published names of gate, up and down.
  """
  matrices = zip(('gate', 'up', 'down'), projections)
  names = {f'{path}.{ours}': f'{where}.{theirs}.weight' for ours, theirs in matrices}
  return in_layers(names, 'transposed')


def attention(projections: Mapping[str, str], norms: Mapping[str, str]) -> dict[str, Name]:
  """Returns rows of attention's linear layers, each with a bias or not, and of its norms.

  Args:
    projections: our name of a linear layer -> the published one.
    norms: our name of a norm -> the published one.
  """
  weights: dict[str, str] = {}
  others: dict[str, str] = {}
  for ours, theirs in projections.items():
    weights[f'attention.{ours}.w'] = f'self_attn.{theirs}.weight'
    others[f'attention.{ours}.b'] = f'self_attn.{theirs}.bias'
  for ours, theirs in norms.items():
    others[f'attention.{ours}.scale'] = f'self_attn.{theirs}.weight'
  return in_layers(weights, 'transposed') | in_layers(others)


MODEL = {
  'embed.table': Name('model.embed_tokens.weight'),
  'head.w': Name('lm_head.weight', 'transposed'),
  'norm.scale': Name('model.norm.weight'),
}
NORMS = in_layers(
  {
    'attention_norm.scale': 'input_layernorm.weight',
    'ffn_norm.scale': 'post_attention_layernorm.weight',
    'moe_norm.scale': 'post_attention_layernorm.weight',
  }
)
# The norm before the FFN gives up its name to the one after attention.
SANDWICH_NORMS = in_layers(
  {
    'attention_norm.scale': 'input_layernorm.weight',
    'attention_post_norm.scale': 'post_attention_layernorm.weight',
    'ffn_norm.scale': 'pre_mlp_layernorm.weight',
    'moe_norm.scale': 'pre_mlp_layernorm.weight',
    'ffn_post_norm.scale': 'post_mlp_layernorm.weight',
    'moe_post_norm.scale': 'post_mlp_layernorm.weight',
  }
)
GROUPED = attention(
  {'q': 'q_proj', 'k': 'k_proj', 'v': 'v_proj', 'out': 'o_proj'},
  {'q_norm': 'q_norm', 'k_norm': 'k_norm'},
)
LATENT = attention(
  {
    'q': 'q_proj',
    'q_a': 'q_a_proj',
    'q_b': 'q_b_proj',
    'kv_a': 'kv_a_proj_with_mqa',
    'kv_b': 'kv_b_proj',
    'out': 'o_proj',
  },
  {'q_a_norm': 'q_a_layernorm', 'kv_a_norm': 'kv_a_layernorm'},
)
DENSE_FFN = ffn('ffn', 'mlp')
MOE = in_layers({'moe.router': 'mlp.gate.weight'}, 'transposed') | ffn(
  'moe.experts', 'mlp.experts.{expert}'
)
# All shared experts lie in one FFN.
SHARED = ffn('moe.shared', 'mlp.shared_experts')
# Files of these families have no bias, and their readers route without one.
NO_ROUTER_BIAS = {'router.bias': Name('', 'zero')}
MTP_NAMES = in_layers(
  {
    'mtp.token_norm.scale': 'enorm.weight',
    'mtp.hidden_norm.scale': 'hnorm.weight',
    'mtp.norm.scale': 'shared_head.norm.weight',
  }
) | in_layers({'mtp.projection.w': 'eh_proj.weight'}, 'transposed')
