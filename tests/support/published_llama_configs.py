"""config.json of models that are spelt as Llama: gpt-oss, Mixtral, OLMoE, Qwen and the dense ones.

Key: (model_type, preset). They are as the hub has them but for keys that only say where code and
weights lie.
"""

from tests.support.published_defaults import SILU

GPT_OSS = SILU | {
  'architectures': ['GptOssForCausalLM'],
  'attention_bias': True,
  'eos_token_id': 200002,
  'experts_per_token': 4,
  'head_dim': 64,
  'hidden_size': 2880,
  'initial_context_length': 4096,
  'intermediate_size': 2880,
  'max_position_embeddings': 131072,
  'model_type': 'gpt_oss',
  'num_attention_heads': 64,
  'num_experts_per_tok': 4,
  'num_key_value_heads': 8,
  'output_router_logits': False,
  'pad_token_id': 199999,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'beta_fast': 32.0,
    'beta_slow': 1.0,
    'factor': 32.0,
    'original_max_position_embeddings': 4096,
    'rope_type': 'yarn',
    'truncate': False,
  },
  'rope_theta': 150000,
  'router_aux_loss_coef': 0.9,
  'sliding_window': 128,
  'swiglu_limit': 7.0,
  'vocab_size': 201088,
  'quantization_config': {
    'modules_to_not_convert': [
      'model.layers.*.self_attn',
      'model.layers.*.mlp.router',
      'model.embed_tokens',
      'lm_head',
    ],
    'quant_method': 'mxfp4',
  },
}
MIXTRAL = SILU | {
  'architectures': ['MixtralForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'model_type': 'mixtral',
  'num_experts_per_tok': 2,
  'num_key_value_heads': 8,
  'num_local_experts': 8,
  'output_router_logits': False,
  'rms_norm_eps': 1e-05,
  'rope_theta': 1000000.0,
  'sliding_window': None,
  'vocab_size': 32000,
}
QWEN2_MOE = SILU | {
  'architectures': ['Qwen2MoeForCausalLM'],
  'bos_token_id': 151643,
  'decoder_sparse_step': 1,
  'eos_token_id': 151643,
  'model_type': 'qwen2_moe',
  'norm_topk_prob': False,
  'output_router_logits': False,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'router_aux_loss_coef': 0.001,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
QWEN3_MOE = SILU | {
  'architectures': ['Qwen3MoeForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 151643,
  'decoder_sparse_step': 1,
  'eos_token_id': 151645,
  'head_dim': 128,
  'max_position_embeddings': 40960,
  'mlp_only_layers': [],
  'model_type': 'qwen3_moe',
  'norm_topk_prob': True,
  'num_experts': 128,
  'num_experts_per_tok': 8,
  'num_key_value_heads': 4,
  'output_router_logits': False,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000.0,
  'router_aux_loss_coef': 0.001,
  'sliding_window': None,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
ALTERNATING = ['sliding_attention', 'full_attention']

LLAMA_LIKE: dict[tuple[str, str], dict[str, object]] = {
  # openai/gpt-oss-120b, gpt-oss-20b
  ('gpt_oss', 'full'): GPT_OSS
  | {'num_hidden_layers': 36, 'num_local_experts': 128, 'layer_types': ALTERNATING * 18},
  ('gpt_oss', '20b'): GPT_OSS
  | {'num_hidden_layers': 24, 'num_local_experts': 32, 'layer_types': ALTERNATING * 12},
  # mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
  ('mixtral', 'full'): MIXTRAL
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'router_aux_loss_coef': 0.02,
  },
  ('mixtral', '8x22b'): MIXTRAL
  | {
    'hidden_size': 6144,
    'intermediate_size': 16384,
    'max_position_embeddings': 65536,
    'num_attention_heads': 48,
    'num_hidden_layers': 56,
    'router_aux_loss_coef': 0.001,
    'router_jitter_noise': 0.0,
  },
  # allenai/OLMoE-1B-7B-0924
  ('olmoe', 'full'): SILU
  | {
    'architectures': ['OlmoeForCausalLM'],
    'attention_bias': False,
    'clip_qkv': None,
    'eos_token_id': 50279,
    'hidden_size': 2048,
    'intermediate_size': 1024,
    'max_position_embeddings': 4096,
    'model_type': 'olmoe',
    'norm_topk_prob': False,
    'num_attention_heads': 16,
    'num_experts': 64,
    'num_experts_per_tok': 8,
    'num_hidden_layers': 16,
    'num_key_value_heads': 16,
    'output_router_logits': False,
    'pad_token_id': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'router_aux_loss_coef': 0.01,
    'vocab_size': 50304,
  },
  # Qwen/Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B
  ('qwen2_moe', 'full'): QWEN2_MOE
  | {
    'hidden_size': 2048,
    'intermediate_size': 5632,
    'max_position_embeddings': 8192,
    'max_window_layers': 21,
    'moe_intermediate_size': 1408,
    'num_attention_heads': 16,
    'num_experts': 60,
    'num_experts_per_tok': 4,
    'num_hidden_layers': 24,
    'num_key_value_heads': 16,
    'shared_expert_intermediate_size': 5632,
    'sliding_window': 32768,
  },
  ('qwen2_moe', '57b_a14b'): QWEN2_MOE
  | {
    'hidden_size': 3584,
    'intermediate_size': 18944,
    'max_position_embeddings': 131072,
    'max_window_layers': 28,
    'moe_intermediate_size': 2560,
    'num_attention_heads': 28,
    'num_experts': 64,
    'num_experts_per_tok': 8,
    'num_hidden_layers': 28,
    'num_key_value_heads': 4,
    'shared_expert_intermediate_size': 20480,
    'sliding_window': 131072,
  },
  # Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B
  ('qwen3_moe', 'full'): QWEN3_MOE
  | {
    'hidden_size': 2048,
    'intermediate_size': 6144,
    'max_window_layers': 48,
    'moe_intermediate_size': 768,
    'num_attention_heads': 32,
    'num_hidden_layers': 48,
  },
  ('qwen3_moe', '235b_a22b'): QWEN3_MOE
  | {
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'max_window_layers': 94,
    'moe_intermediate_size': 1536,
    'num_attention_heads': 64,
    'num_hidden_layers': 94,
  },
  # meta-llama/Llama-2-7b-hf
  ('llama', 'full'): SILU
  | {
    'architectures': ['LlamaForCausalLM'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'max_position_embeddings': 4096,
    'model_type': 'llama',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 32,
    'pretraining_tp': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': None,
    'vocab_size': 32000,
  },
  # mistralai/Mistral-7B-v0.1
  ('mistral', 'full'): SILU
  | {
    'architectures': ['MistralForCausalLM'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'model_type': 'mistral',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-05,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'vocab_size': 32000,
  },
  # Qwen/Qwen2.5-7B
  ('qwen2', 'full'): SILU
  | {
    'architectures': ['Qwen2ForCausalLM'],
    'bos_token_id': 151643,
    'eos_token_id': 151643,
    'hidden_size': 3584,
    'intermediate_size': 18944,
    'max_position_embeddings': 131072,
    'max_window_layers': 28,
    'model_type': 'qwen2',
    'num_attention_heads': 28,
    'num_hidden_layers': 28,
    'num_key_value_heads': 4,
    'rms_norm_eps': 1e-06,
    'rope_theta': 1000000.0,
    'sliding_window': 131072,
    'use_sliding_window': False,
    'vocab_size': 152064,
  },
  # Qwen/Qwen3-8B
  ('qwen3', 'full'): SILU
  | {
    'architectures': ['Qwen3ForCausalLM'],
    'attention_bias': False,
    'bos_token_id': 151643,
    'eos_token_id': 151645,
    'head_dim': 128,
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'max_position_embeddings': 40960,
    'max_window_layers': 36,
    'model_type': 'qwen3',
    'num_attention_heads': 32,
    'num_hidden_layers': 36,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': None,
    'use_sliding_window': False,
    'vocab_size': 151936,
  },
}
