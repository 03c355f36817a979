"""Tests of moejax.train.step."""
