"""Tests of moejax.inference."""
