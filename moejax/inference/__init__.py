"""Text from a model: decoding with a KV cache, drafts by multi-token prediction, sampling."""
