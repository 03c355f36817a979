"""The transformer: attention, blocks, multi-token prediction, and its config."""
