"""What several checkpoints share: sizes and rope of their config.json, and likely mistakes."""

BASE = {
  'vocab_size': 80,
  'hidden_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-2,
  'max_position_embeddings': 512,
  'pad_token_id': None,
  'bos_token_id': 78,
  'eos_token_id': 79,
}
LATENT = BASE | {
  'num_key_value_heads': 4,
  'num_hidden_layers': 3,
  'first_k_dense_replace': 1,
  'intermediate_size': 36,
  'kv_lora_rank': 10,
  'q_lora_rank': 14,
  'qk_nope_head_dim': 6,
  'qk_rope_head_dim': 8,
  'v_head_dim': 5,
  'n_routed_experts': 12,
  'n_shared_experts': 2,
  'moe_intermediate_size': 7,
  'num_experts_per_tok': 4,
  'routed_scaling_factor': 2.5,
}
ROPE = {'rope_type': 'default', 'rope_theta': 100.0}
# Of 8 rotated features, some frequencies are kept, some divided and some between, by another share
# if not truncated.
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 50.0,
  'factor': 4.0,
  'original_max_position_embeddings': 128,
  'beta_fast': 4.0,
  'beta_slow': 1.0,
}
SMALL_LATENTS = {'q_a_proj': 0.2, 'kv_a_proj': 0.2}
EVEN = {'e_score_correction_bias': 0.3}  # biases that leave no expert idle

# Mistakes.
EPS = {'eps': {'rms_norm_eps': 1e-6}}
WEIGHTS = {
  'weights not normalised': {'norm_topk_prob': False},
  'weights not scaled': {'routed_scaling_factor': 1.0},
}
THETA = {'theta': {'rope_parameters': ROPE | {'rope_theta': 1e4}}}
HALVES = {'halves rotated': {'rope_interleave': False}}
NO_YARN = {'no YaRN': {'rope_parameters': ROPE | {'rope_theta': 50.0}}}
HEAD_DIM = {'head_dim': 8}  # not hidden_size / num_attention_heads
