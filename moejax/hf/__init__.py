"""Published checkpoints, imported and exported: `python -m moejax.hf`."""
