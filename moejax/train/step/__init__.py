"""The training step, a pure function: objective, gradient accumulation, optimizer, router bias."""
