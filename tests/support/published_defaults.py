"""What config.json of almost every published model says, whoever published it."""

SILU = {
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'use_cache': True,
  'attention_dropout': 0.0,
}
