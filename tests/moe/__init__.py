"""Tests of moejax.moe."""
