"""config.json of published models, as the hub has them but for keys that only say where code and weights lie.

Key: (model_type, preset). Values were compared with copies in public repositories where there is one.
"""
SILU = {'hidden_act': 'silu', 'initializer_range': 0.02, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'use_cache': True, 'attention_dropout': 0.0}
YARN = {'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'original_max_position_embeddings': 4096, 'type': 'yarn'}
DEEPSEEK_V2 = SILU | {
    'architectures': ['DeepseekV2ForCausalLM'], 'attention_bias': False, 'aux_loss_alpha': 0.001,
    'bos_token_id': 100000, 'eos_token_id': 100001, 'ep_size': 1, 'first_k_dense_replace': 1, 'kv_lora_rank': 512,
    'max_position_embeddings': 163840, 'model_type': 'deepseek_v2', 'moe_layer_freq': 1, 'n_shared_experts': 2,
    'norm_topk_prob': False, 'num_experts_per_tok': 6, 'pretraining_tp': 1, 'qk_nope_head_dim': 128,
    'qk_rope_head_dim': 64, 'rms_norm_eps': 1e-06, 'rope_scaling': YARN | {'mscale': 0.707, 'mscale_all_dim': 0.707},
    'rope_theta': 10000, 'scoring_func': 'softmax', 'seq_aux': True, 'v_head_dim': 128, 'vocab_size': 102400}
GLM = SILU | {
    'architectures': ['Glm4MoeForCausalLM'], 'attention_bias': True, 'eos_token_id': [151329, 151336, 151338],
    'head_dim': 128, 'max_position_embeddings': 131072, 'model_type': 'glm4_moe', 'n_group': 1, 'n_shared_experts': 1,
    'norm_topk_prob': True, 'num_attention_heads': 96, 'num_experts_per_tok': 8, 'num_key_value_heads': 8,
    'num_nextn_predict_layers': 1, 'pad_token_id': 151329, 'partial_rotary_factor': 0.5, 'rms_norm_eps': 1e-05,
    'rope_scaling': None, 'rope_theta': 1000000, 'topk_group': 1, 'vocab_size': 151552}
GPT_OSS = SILU | {
    'architectures': ['GptOssForCausalLM'], 'attention_bias': True, 'eos_token_id': 200002, 'experts_per_token': 4,
    'head_dim': 64, 'hidden_size': 2880, 'initial_context_length': 4096, 'intermediate_size': 2880,
    'max_position_embeddings': 131072, 'model_type': 'gpt_oss', 'num_attention_heads': 64, 'num_experts_per_tok': 4,
    'num_key_value_heads': 8, 'output_router_logits': False, 'pad_token_id': 199999, 'rms_norm_eps': 1e-05,
    'rope_scaling': {'beta_fast': 32.0, 'beta_slow': 1.0, 'factor': 32.0, 'original_max_position_embeddings': 4096,
                     'rope_type': 'yarn', 'truncate': False},
    'rope_theta': 150000, 'router_aux_loss_coef': 0.9, 'sliding_window': 128, 'swiglu_limit': 7.0, 'vocab_size': 201088,
    'quantization_config': {'modules_to_not_convert': ['model.layers.*.self_attn', 'model.layers.*.mlp.router',
                                                       'model.embed_tokens', 'lm_head'], 'quant_method': 'mxfp4'}}
MIXTRAL = SILU | {
    'architectures': ['MixtralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'model_type': 'mixtral',
    'num_experts_per_tok': 2, 'num_key_value_heads': 8, 'num_local_experts': 8, 'output_router_logits': False,
    'rms_norm_eps': 1e-05, 'rope_theta': 1000000.0, 'sliding_window': None, 'vocab_size': 32000}
QWEN2_MOE = SILU | {
    'architectures': ['Qwen2MoeForCausalLM'], 'bos_token_id': 151643, 'decoder_sparse_step': 1, 'eos_token_id': 151643,
    'model_type': 'qwen2_moe', 'norm_topk_prob': False, 'output_router_logits': False, 'rms_norm_eps': 1e-06,
    'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.001, 'use_sliding_window': False, 'vocab_size': 151936}
QWEN3_MOE = SILU | {
    'architectures': ['Qwen3MoeForCausalLM'], 'attention_bias': False, 'bos_token_id': 151643, 'decoder_sparse_step': 1,
    'eos_token_id': 151645, 'head_dim': 128, 'max_position_embeddings': 40960, 'mlp_only_layers': [],
    'model_type': 'qwen3_moe', 'norm_topk_prob': True, 'num_experts': 128, 'num_experts_per_tok': 8,
    'num_key_value_heads': 4, 'output_router_logits': False, 'rms_norm_eps': 1e-06, 'rope_scaling': None,
    'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.001, 'sliding_window': None, 'use_sliding_window': False,
    'vocab_size': 151936}
ALTERNATING = ['sliding_attention', 'full_attention']

PUBLISHED: dict[tuple[str, str], dict[str, object]] = {
    # deepseek-ai/DeepSeek-V3
    ('deepseek_v3', 'full'): SILU | {
        'architectures': ['DeepseekV3ForCausalLM'], 'attention_bias': False, 'bos_token_id': 0, 'eos_token_id': 1,
        'ep_size': 1, 'first_k_dense_replace': 3, 'hidden_size': 7168, 'intermediate_size': 18432, 'kv_lora_rank': 512,
        'max_position_embeddings': 163840, 'model_type': 'deepseek_v3', 'moe_intermediate_size': 2048,
        'moe_layer_freq': 1, 'n_group': 8, 'n_routed_experts': 256, 'n_shared_experts': 1, 'norm_topk_prob': True,
        'num_attention_heads': 128, 'num_experts_per_tok': 8, 'num_hidden_layers': 61, 'num_key_value_heads': 128,
        'num_nextn_predict_layers': 1, 'q_lora_rank': 1536, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64,
        'quantization_config': {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8',
                                'weight_block_size': [128, 128]},
        'rms_norm_eps': 1e-06, 'rope_scaling': YARN | {'mscale': 1.0, 'mscale_all_dim': 1.0}, 'rope_theta': 10000,
        'routed_scaling_factor': 2.5, 'scoring_func': 'sigmoid', 'topk_group': 4, 'topk_method': 'noaux_tc',
        'v_head_dim': 128, 'vocab_size': 129280},
    # deepseek-ai/DeepSeek-V2, DeepSeek-V2-Lite
    ('deepseek_v2', 'full'): DEEPSEEK_V2 | {
        'hidden_size': 5120, 'intermediate_size': 12288, 'moe_intermediate_size': 1536, 'n_group': 8,
        'n_routed_experts': 160, 'num_attention_heads': 128, 'num_hidden_layers': 60, 'num_key_value_heads': 128,
        'q_lora_rank': 1536, 'routed_scaling_factor': 16.0, 'topk_group': 3, 'topk_method': 'group_limited_greedy'},
    ('deepseek_v2', 'lite'): DEEPSEEK_V2 | {
        'hidden_size': 2048, 'intermediate_size': 10944, 'moe_intermediate_size': 1408, 'n_group': 1,
        'n_routed_experts': 64, 'num_attention_heads': 16, 'num_hidden_layers': 27, 'num_key_value_heads': 16,
        'q_lora_rank': None, 'routed_scaling_factor': 1.0, 'topk_group': 1, 'topk_method': 'greedy'},
    # zai-org/GLM-4.5, GLM-4.5-Air
    ('glm4_moe', 'full'): GLM | {
        'first_k_dense_replace': 3, 'hidden_size': 5120, 'intermediate_size': 12288, 'moe_intermediate_size': 1536,
        'n_routed_experts': 160, 'num_hidden_layers': 92, 'routed_scaling_factor': 2.5, 'use_qk_norm': True},
    ('glm4_moe', 'air'): GLM | {
        'first_k_dense_replace': 1, 'hidden_size': 4096, 'intermediate_size': 10944, 'moe_intermediate_size': 1408,
        'n_routed_experts': 128, 'num_hidden_layers': 46, 'routed_scaling_factor': 1.0, 'use_qk_norm': False},
    # openai/gpt-oss-120b, gpt-oss-20b
    ('gpt_oss', 'full'): GPT_OSS | {
        'num_hidden_layers': 36, 'num_local_experts': 128, 'layer_types': ALTERNATING * 18},
    ('gpt_oss', '20b'): GPT_OSS | {
        'num_hidden_layers': 24, 'num_local_experts': 32, 'layer_types': ALTERNATING * 12},
    # mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
    ('mixtral', 'full'): MIXTRAL | {
        'hidden_size': 4096, 'intermediate_size': 14336, 'max_position_embeddings': 32768, 'num_attention_heads': 32,
        'num_hidden_layers': 32, 'router_aux_loss_coef': 0.02},
    ('mixtral', '8x22b'): MIXTRAL | {
        'hidden_size': 6144, 'intermediate_size': 16384, 'max_position_embeddings': 65536, 'num_attention_heads': 48,
        'num_hidden_layers': 56, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0},
    # allenai/OLMoE-1B-7B-0924
    ('olmoe', 'full'): SILU | {
        'architectures': ['OlmoeForCausalLM'], 'attention_bias': False, 'clip_qkv': None, 'eos_token_id': 50279,
        'hidden_size': 2048, 'intermediate_size': 1024, 'max_position_embeddings': 4096, 'model_type': 'olmoe',
        'norm_topk_prob': False, 'num_attention_heads': 16, 'num_experts': 64, 'num_experts_per_tok': 8,
        'num_hidden_layers': 16, 'num_key_value_heads': 16, 'output_router_logits': False, 'pad_token_id': 1,
        'rms_norm_eps': 1e-05, 'rope_scaling': None, 'rope_theta': 10000.0, 'router_aux_loss_coef': 0.01,
        'vocab_size': 50304},
    # openPangu-Ultra-MoE-718B, in the spelling that vLLM loads
    ('pangu_ultra_moe', 'full'): SILU | {
        'architectures': ['PanguUltraMoEForCausalLM'], 'attention_bias': False, 'first_k_dense_replace': 3,
        'hidden_size': 7680, 'intermediate_size': 18432, 'kv_lora_rank': 512, 'max_position_embeddings': 131072,
        'model_type': 'pangu_ultra_moe', 'moe_intermediate_size': 2048, 'n_routed_experts': 256, 'n_shared_experts': 1,
        'norm_topk_prob': True, 'num_attention_heads': 128, 'num_experts_per_tok': 8, 'num_hidden_layers': 61,
        'num_key_value_heads': 128, 'num_nextn_predict_layers': 1, 'q_lora_rank': 1536, 'qk_nope_head_dim': 128,
        'qk_rope_head_dim': 64, 'rms_norm_eps': 1e-05, 'rope_theta': 25600000, 'routed_scaling_factor': 2.5,
        'sandwich_norm': True, 'v_head_dim': 128, 'vocab_size': 153600},
    # Qwen/Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B
    ('qwen2_moe', 'full'): QWEN2_MOE | {
        'hidden_size': 2048, 'intermediate_size': 5632, 'max_position_embeddings': 8192, 'max_window_layers': 21,
        'moe_intermediate_size': 1408, 'num_attention_heads': 16, 'num_experts': 60, 'num_experts_per_tok': 4,
        'num_hidden_layers': 24, 'num_key_value_heads': 16, 'shared_expert_intermediate_size': 5632,
        'sliding_window': 32768},
    ('qwen2_moe', '57b_a14b'): QWEN2_MOE | {
        'hidden_size': 3584, 'intermediate_size': 18944, 'max_position_embeddings': 131072, 'max_window_layers': 28,
        'moe_intermediate_size': 2560, 'num_attention_heads': 28, 'num_experts': 64, 'num_experts_per_tok': 8,
        'num_hidden_layers': 28, 'num_key_value_heads': 4, 'shared_expert_intermediate_size': 20480,
        'sliding_window': 131072},
    # Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B
    ('qwen3_moe', 'full'): QWEN3_MOE | {
        'hidden_size': 2048, 'intermediate_size': 6144, 'max_window_layers': 48, 'moe_intermediate_size': 768,
        'num_attention_heads': 32, 'num_hidden_layers': 48},
    ('qwen3_moe', '235b_a22b'): QWEN3_MOE | {
        'hidden_size': 4096, 'intermediate_size': 12288, 'max_window_layers': 94, 'moe_intermediate_size': 1536,
        'num_attention_heads': 64, 'num_hidden_layers': 94},
    # meta-llama/Llama-2-7b-hf
    ('llama', 'full'): SILU | {
        'architectures': ['LlamaForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_size': 4096,
        'intermediate_size': 11008, 'max_position_embeddings': 4096, 'model_type': 'llama', 'num_attention_heads': 32,
        'num_hidden_layers': 32, 'num_key_value_heads': 32, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_scaling': None, 'vocab_size': 32000},
    # mistralai/Mistral-7B-v0.1
    ('mistral', 'full'): SILU | {
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_size': 4096,
        'intermediate_size': 14336, 'max_position_embeddings': 32768, 'model_type': 'mistral',
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05,
        'rope_theta': 10000.0, 'sliding_window': 4096, 'vocab_size': 32000},
    # Qwen/Qwen2.5-7B
    ('qwen2', 'full'): SILU | {
        'architectures': ['Qwen2ForCausalLM'], 'bos_token_id': 151643, 'eos_token_id': 151643, 'hidden_size': 3584,
        'intermediate_size': 18944, 'max_position_embeddings': 131072, 'max_window_layers': 28, 'model_type': 'qwen2',
        'num_attention_heads': 28, 'num_hidden_layers': 28, 'num_key_value_heads': 4, 'rms_norm_eps': 1e-06,
        'rope_theta': 1000000.0, 'sliding_window': 131072, 'use_sliding_window': False, 'vocab_size': 152064},
    # Qwen/Qwen3-8B
    ('qwen3', 'full'): SILU | {
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'bos_token_id': 151643, 'eos_token_id': 151645,
        'head_dim': 128, 'hidden_size': 4096, 'intermediate_size': 12288, 'max_position_embeddings': 40960,
        'max_window_layers': 36, 'model_type': 'qwen3', 'num_attention_heads': 32, 'num_hidden_layers': 36,
        'num_key_value_heads': 8, 'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': None, 'use_sliding_window': False, 'vocab_size': 151936},
}

# Parameters in billions, as their publishers say: total and active. What each of them counts:
# 'all' everything that the main model has; 'embed' all but the embedding; 'both' neither embedding nor head.
# Without multi-token prediction, but for GLM-4.5, whose report counts it, and neither embedding nor head.
FIGURES: dict[tuple[str, str], tuple[float, str, float, str]] = {
    ('deepseek_v3', 'full'): (671.0, 'all', 37.6, 'all'),        # its README_WEIGHTS: 36.6 without the embedding
    ('pangu_ultra_moe', 'full'): (719.1, 'all', 40.4, 'all'),    # its README: 718 and 39 (without the embedding)
    ('deepseek_v2', 'full'): (236, 'all', 21, 'all'),
    ('deepseek_v2', 'lite'): (15.7, 'all', 2.45, 'embed'),          # 2.4 in its README, cut off and not rounded
    ('glm4_moe', 'full'): (355, 'both+mtp', 32, 'both'),
    ('glm4_moe', 'air'): (106, 'both', 12, 'both'),              # 108.0 with its layer of multi-token prediction
    ('gpt_oss', 'full'): (116.8, 'all', 5.1, 'embed'),
    ('gpt_oss', '20b'): (20.9, 'all', 3.6, 'embed'),
    ('mixtral', 'full'): (46.7, 'all', 12.9, 'all'),
    ('mixtral', '8x22b'): (141, 'all', 39, 'all'),
    ('olmoe', 'full'): (6.9, 'all', 1.3, 'all'),
    ('qwen2_moe', 'full'): (14.3, 'all', 2.7, 'all'),
    ('qwen2_moe', '57b_a14b'): (57.4, 'all', 14.2, 'all'),
    ('qwen3_moe', 'full'): (30.5, 'all', 3.35, 'all'),           # 3.3 on its card, cut off and not rounded
    ('qwen3_moe', '235b_a22b'): (235, 'all', 22, 'all'),
    ('llama', 'full'): (6.74, 'all', 6.74, 'all'),
    ('mistral', 'full'): (7.24, 'all', 7.24, 'all'),
    ('qwen2', 'full'): (7.62, 'all', 7.62, 'all'),               # 6.53 without embedding and head
    ('qwen3', 'full'): (8.2, 'all', 8.2, 'all'),
}
