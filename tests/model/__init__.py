"""Tests of moejax.model."""
