"""Tests of moejax.runtime."""
