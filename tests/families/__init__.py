"""Tests of moejax.families."""
