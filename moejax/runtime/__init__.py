"""The process that a run lives in: files, signals, faults, other processes.

Importing this package loads no jax: plans are made without it.
"""
