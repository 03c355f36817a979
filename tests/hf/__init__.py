"""Tests of moejax.hf."""
