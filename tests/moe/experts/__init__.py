"""Tests of moejax.moe.experts."""
