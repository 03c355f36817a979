"""Tests of moejax.data."""
