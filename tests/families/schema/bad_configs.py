"""Changes of a tiny config.json that are refused, and how the message begins after its name."""

from moejax.families.schema.family import UNBUILT

BAD = [
  # contradictions and wrong values, in the words of config.json
  ('deepseek_v3', {'n_group': 3}, 'n_group=3 does not divide n_routed_experts=8'),
  ('deepseek_v3', {'topk_group': 9}, 'topk_group=9: use 1 to n_group=4'),
  ('deepseek_v3', {'num_key_value_heads': 2}, 'num_key_value_heads=2: use num_attention_heads=4'),
  (
    'deepseek_v3',
    {'qk_head_dim': 10},
    r'qk_head_dim=10 is not qk_nope_head_dim=10 \+ qk_rope_head_dim=8',
  ),
  (
    'deepseek_v3',
    {'first_k_dense_replace': 3},
    'first_k_dense_replace=3: use 0 to num_hidden_layers - 1 = 2',
  ),
  ('mixtral', {'num_experts_per_tok': 5}, 'num_experts_per_tok=5: use 1 to num_local_experts=4'),
  (
    'mixtral',
    {'num_key_value_heads': 3},
    'num_key_value_heads=3 does not divide num_attention_heads=4',
  ),
  (
    'mixtral',
    {'hidden_size': 30, 'head_dim': ...},
    'hidden_size=30 does not divide into num_attention_heads=4',
  ),
  ('mixtral', {'vocab_size': 0}, 'vocab_size=0: use 1 or more'),
  ('mixtral', {'hidden_size': '32'}, "hidden_size='32' is str; give int"),
  ('mixtral', {'rms_norm_eps': None}, 'rms_norm_eps=null: give a value'),
  (
    'gpt_oss',
    {'layer_types': ['full_attention']},
    'layer_types names 1 layers of num_hidden_layers=4',
  ),
  ('gpt_oss', {'layer_types': 'full'}, "layer_types='full': use a list"),
  ('gpt_oss', {'num_experts': 4}, 'num_experts=4 and num_local_experts=8 are one thing'),
  ('gpt_oss', {'sliding_window': 0}, 'sliding_window=0: use null'),
  (
    'qwen2_moe',
    {'shared_expert_intermediate_size': 0},
    'shared_expert_intermediate_size=0: use a whole number, 1 or more',
  ),
  (
    'qwen3_moe',
    {'rope_theta': 5.0, 'rope_parameters': {'rope_theta': 6.0}},
    'rope_theta=5.0 and rope_theta=6.0',
  ),
  # missing
  ('mixtral', {'hidden_size': ...}, 'hidden_size is missing: copy it from'),
  ('mixtral', {'num_local_experts': ...}, 'num_local_experts is missing'),
  ('mixtral', {'rms_norm_eps': ...}, 'rms_norm_eps is missing'),
  ('deepseek_v2', {'num_experts_per_tok': ...}, 'num_experts_per_tok is missing'),
  ('pangu_ultra_moe', {'rms_norm_eps': ...}, 'rms_norm_eps is missing'),
  (
    'pangu_ultra_moe',
    {'sandwich_norm': ...},
    "sandwich_norm is missing: .* model_type='deepseek_v3'",
  ),
  # not built
  ('mixtral', {'hidden_act': 'gelu'}, "hidden_act='gelu': use 'silu'"),
  ('llama', {'mlp_bias': True}, 'mlp_bias=True: use False'),
  (
    'llama',
    {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
    "rope_type='llama3' is not built here",
  ),
  (
    'qwen2',
    {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
    "rope_type='dynamic' is not built here",
  ),
  (
    'mistral',
    {'rope_parameters': {'rope_type': 'longrope'}},
    "rope_type='longrope' is not built here",
  ),
  (
    'gpt_oss',
    {'rope_parameters': {'full_attention': {'rope_theta': 1e4}}},
    '.*use one table for all layers',
  ),
  ('gpt_oss', {'layer_types': ['chunked_attention'] * 4}, "layer_types has 'chunked_attention'"),
  ('mixtral', {'rope_scaling': [1]}, r'rope_parameters=\[1\]: use one table'),
  (
    'mixtral',
    {'partial_rotary_factor': 0.5},
    'partial_rotary_factor=0.5: this family rotates whole heads',
  ),
  (
    'qwen3_moe',
    {'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'mscale_all_dim': 1.0}},
    'mscale_all_dim=1.0 scale',
  ),
  ('qwen3_moe', {'decoder_sparse_step': 0}, 'decoder_sparse_step=0: use a whole number, 1 or more'),
  (
    'qwen3_moe',
    {'decoder_sparse_step': 4, 'mlp_only_layers': [3]},
    r'decoder_sparse_step=4 and mlp_only_layers=\[3\] leave no layer experts',
  ),
  (
    'qwen3_moe',
    {'mlp_only_layers': [-1, 0, 4]},
    r'mlp_only_layers=\[-1, 0, 4\] names \[-1, 4\]: use layers of num_hidden_layers=4, 0 to 3',
  ),
  ('qwen3_moe', {'mlp_only_layers': 2}, 'mlp_only_layers=2: use a list'),
  (
    'qwen3_moe',
    {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 2},
    'max_window_layers=2',
  ),
  ('deepseek_v3', {'moe_layer_freq': 2}, 'moe_layer_freq=2: use 1'),
  ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func='softmax': use 'sigmoid'"),
  ('deepseek_v3', {'topk_method': 'greedy'}, "topk_method='greedy': use 'noaux_tc'"),
  (
    'deepseek_v2',
    {'topk_method': 'noaux_tc'},
    "topk_method='noaux_tc': use greedy or group_limited_greedy",
  ),
  ('deepseek_v2', {'norm_topk_prob': True}, 'norm_topk_prob=True: use False'),
  *(('pangu_ultra_moe', {name: 128}, f'{name}=128 is not built here') for name in UNBUILT),
  ('pangu_ultra_moe', {'use_mhc': True}, 'use_mhc=True is not built here'),
  ('glm4_moe', {'use_qk_norm': 'yes'}, "use_qk_norm='yes': use true or false"),
]
