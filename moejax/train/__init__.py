"""Training: the experiment, the pure step, the loop around it, and what it records."""
