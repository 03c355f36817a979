"""Tests of moejax.plan."""
