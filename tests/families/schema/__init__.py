"""Tests of moejax.families.schema."""
