"""What describes a published architecture: keys of its config.json, names of its tensors."""
