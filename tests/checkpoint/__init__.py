"""Tests of moejax.checkpoint."""
