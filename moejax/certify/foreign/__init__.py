"""Certifies functions of other codebases: NumPy in, NumPy out, and no jax."""
