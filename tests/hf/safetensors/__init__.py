"""Tests of moejax.hf.safetensors."""
