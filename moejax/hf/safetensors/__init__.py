"""Directories of safetensors files, read without trust and written whole. Knows no model."""
