"""The checkpoints: sizes, what makes each family what it is, and mistakes that logits must show.

Widths differ wherever they may, so that no transposed matrix and no swapped width fits. Whatever an
eps is added to is small or the eps is large, so that a wrong one shows.
"""

from models import Family
from shared_keys import (
  BASE,
  EPS,
  EVEN,
  HALVES,
  HEAD_DIM,
  LATENT,
  NO_YARN,
  ROPE,
  SMALL_LATENTS,
  THETA,
  WEIGHTS,
  YARN,
)

FAMILIES = {
  'deepseek_v3': Family(
    'DeepseekV3ForCausalLM',
    LATENT
    | {
      'n_group': 4,
      'topk_group': 2,
      'norm_topk_prob': True,
      'num_nextn_predict_layers': 1,
      'rope_parameters': YARN | {'mscale': 0.8, 'mscale_all_dim': 1.2},
    },
    score='sigmoid',
    group='top2',
    gains=SMALL_LATENTS | EVEN,
    mtp_depth=1,
    mistakes=EPS
    | WEIGHTS
    | HALVES
    | NO_YARN
    | {
      'latent eps': {'latent_norm_eps': 1e-2},
      'no mscale': {'rope_parameters': YARN},
      'beta_fast': {
        'rope_parameters': YARN | {'mscale': 0.8, 'mscale_all_dim': 1.2, 'beta_fast': 32.0}
      },
      'no groups': {'n_group': 1, 'topk_group': 1},
    },
    silenced={'e_score_correction_bias': 0},
    hub={
      'scoring_func': 'sigmoid',
      'topk_method': 'noaux_tc',
      'moe_layer_freq': 1,
      'aux_loss_alpha': 0.001,
      'seq_aux': True,
      'ep_size': 1,
    },
  ),
  # Sandwich norms and latents follow small matrices, because rms_norm_eps must be the published
  # 1e-5 here: sources differ on whether the latent norms use it or that number, and this golden
  # does not choose between the two.
  'openpangu_ultra_moe': Family(
    'PanguUltraMoEForCausalLM',
    LATENT
    | {
      'rms_norm_eps': 1e-5,
      'n_routed_experts': 8,
      'n_group': 1,
      'topk_group': 1,
      'num_experts_per_tok': 3,
      'norm_topk_prob': True,
      'num_nextn_predict_layers': 1,
      'rope_parameters': ROPE,
    },
    score='sigmoid',
    mtp_depth=1,
    learning_rate=1e-3,
    gains={
      'q_a_proj': 0.03,
      'kv_a_proj': 0.05,
      'embed_tokens': 0.05,
      'o_proj': 0.05,
      'down_proj': 0.1,
    },
    mistakes=EPS | WEIGHTS | HALVES | THETA | {'latent eps': {'latent_norm_eps': 1e-6}},
    names={
      'first_k_dense_replace': 'num_dense_layers',
      'n_routed_experts': 'num_routed_experts',
      'n_shared_experts': 'num_shared_experts',
      'q_lora_rank': 'attention_q_lora_dim',
      'kv_lora_rank': 'attention_kv_lora_dim',
      'qk_nope_head_dim': 'attention_qk_dim',
      'qk_rope_head_dim': 'attention_qk_rope_dim',
      'v_head_dim': 'attention_v_dim',
      'num_nextn_predict_layers': 'num_mtp_layers',
    },
    hub={'model_type': 'pangu_ultra_moe', 'sandwich_norm': True},
  ),
  'mixtral': Family(
    'MixtralForCausalLM',
    BASE
    | {
      'intermediate_size': 14,
      'num_local_experts': 6,
      'num_experts_per_tok': 2,
      'sliding_window': 5,
      'rope_parameters': ROPE,
    },
    score='softmax',
    experts=('w1', 'w3', 'w2'),
    moe='block_sparse_moe',
    shard_size='40KB',
    mistakes=EPS
    | THETA
    | {
      'no window': {'sliding_window': None},
      'window one short': {'sliding_window': 4},
      'window one long': {'sliding_window': 6},
    },
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    BASE
    | HEAD_DIM
    | {
      # Experts in layers 3 and 5 alone: every second layer would have them, but for layer 1.
      'num_hidden_layers': 6,
      'decoder_sparse_step': 2,
      'mlp_only_layers': [1],
      'intermediate_size': 36,
      'moe_intermediate_size': 10,
      'num_experts': 6,
      'num_experts_per_tok': 2,
      'norm_topk_prob': True,
      'rope_parameters': ROPE,
    },
    score='softmax',
    mistakes=EPS | THETA | {'weights not normalised': {'norm_topk_prob': False}},
    silenced={'q_norm': 1, 'k_norm': 1},
  ),
  'olmoe': Family(
    'OlmoeForCausalLM',
    BASE
    | {
      'intermediate_size': 10,
      'num_experts': 6,
      'num_experts_per_tok': 2,
      'norm_topk_prob': False,
      'clip_qkv': 1.5,
      'rope_parameters': ROPE,
    },
    score='softmax',
    gains={'v_proj': 2},
    mistakes=EPS
    | THETA
    | {'no clip': {'clip_qkv': None}, 'weights normalised': {'norm_topk_prob': True}},
    silenced={'q_norm': 1, 'k_norm': 1},
  ),
  'gpt_oss': Family(
    'GptOssForCausalLM',
    BASE
    | HEAD_DIM
    | {
      'num_hidden_layers': 3,
      'intermediate_size': 10,
      'num_local_experts': 6,
      'num_experts_per_tok': 2,
      'sliding_window': 5,
      'swiglu_limit': 1.5,
      'rope_parameters': YARN | {'truncate': False},
    },
    score='logits',
    experts=(),
    mistakes=EPS
    | NO_YARN
    | {
      'truncated': {'rope_parameters': YARN},
      'no window': {'sliding_window': 99},
      'window one long': {'sliding_window': 6},
      'no limit': {'swiglu_limit': 99.0},
      'windows in other layers': {
        'layer_types': ['full_attention', 'sliding_attention', 'full_attention']
      },
    },
    silenced={
      'sinks': -1e9,
      'router.bias': 0,
      'up_proj_bias': 0,
      'down_proj_bias': 0,
      'q_proj.bias': 0,
      'k_proj.bias': 0,
      'v_proj.bias': 0,
      'o_proj.bias': 0,
    },
    hub={
      'experts_per_token': 2,
      'initial_context_length': 128,
      'rope_scaling': {k: v for k, v in YARN.items() if k != 'rope_theta'} | {'truncate': False},
    },
  ),
  'glm4_moe': Family(
    'Glm4MoeForCausalLM',
    BASE
    | HEAD_DIM
    | {
      'num_hidden_layers': 3,
      'first_k_dense_replace': 1,
      'intermediate_size': 36,
      'moe_intermediate_size': 7,
      'n_routed_experts': 8,
      'n_shared_experts': 1,
      'num_experts_per_tok': 3,
      'routed_scaling_factor': 2.5,
      'n_group': 1,
      'topk_group': 1,
      'norm_topk_prob': True,
      'use_qk_norm': True,
      'attention_bias': True,
      'num_nextn_predict_layers': 2,
      'rope_parameters': ROPE | {'partial_rotary_factor': 0.5},
    },
    score='sigmoid',
    gains=EVEN,
    mtp_depth=2,
    mistakes=EPS
    | WEIGHTS
    | {
      'all rotated': {'rope_parameters': ROPE | {'partial_rotary_factor': 1.0}},
      'no q and k norm': {'use_qk_norm': False},
      'no attention bias': {'attention_bias': False},
    },
    silenced={'e_score_correction_bias': 0},
  ),
  'deepseek_v2': Family(
    'DeepseekV2ForCausalLM',
    LATENT
    | {
      'q_lora_rank': None,
      'n_routed_experts': 6,
      'n_group': 2,
      'topk_group': 1,
      'num_experts_per_tok': 2,
      'topk_method': 'group_limited_greedy',
      'norm_topk_prob': False,
      'rope_parameters': YARN | {'mscale': 0.7, 'mscale_all_dim': 0.7},
    },
    score='softmax',
    group='max',
    gains=SMALL_LATENTS | {'mlp.gate': 0.7},
    mistakes=EPS
    | NO_YARN
    | {
      'latent eps': {'latent_norm_eps': 1e-2},
      'weights not scaled': {'routed_scaling_factor': 1.0},
      'no mscale': {'rope_parameters': YARN},
      'no groups': {'topk_method': 'greedy'},
    },
    hub={
      'scoring_func': 'softmax',
      'moe_layer_freq': 1,
      'aux_loss_alpha': 0.001,
      'seq_aux': True,
      'ep_size': 1,
    },
  ),
  'qwen2_moe': Family(
    'Qwen2MoeForCausalLM',
    BASE
    | {
      'intermediate_size': 36,
      'moe_intermediate_size': 10,
      'shared_expert_intermediate_size': 13,  # no multiple of a routed expert's
      'num_experts': 6,
      'num_experts_per_tok': 2,
      'norm_topk_prob': False,
      'qkv_bias': True,
      'rope_parameters': ROPE,
    },
    score='softmax',
    mistakes=EPS
    | THETA
    | {
      'no bias of q, k and v': {'qkv_bias': False},
      'weights normalised': {'norm_topk_prob': True},
    },
    silenced={'shared_expert_gate': 0},
  ),
  # Dense, with a tied head: what sparse upcycling starts from.
  'llama': Family(
    'LlamaForCausalLM',
    BASE | {'intermediate_size': 16, 'tie_word_embeddings': True, 'rope_parameters': ROPE},
    mistakes=EPS | THETA,
    gains={'embed_tokens': 0.3},
  ),
}
