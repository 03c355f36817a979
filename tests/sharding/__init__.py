"""Tests of moejax.sharding."""
