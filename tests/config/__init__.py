"""Tests of moejax.config."""
