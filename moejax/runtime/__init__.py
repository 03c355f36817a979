"""The process that a run lives in: files, signals, faults, other processes. Imports no jax by itself."""
