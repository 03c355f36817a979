"""Tests of moejax.train."""
