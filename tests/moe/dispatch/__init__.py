"""Tests of moejax.moe.dispatch."""
