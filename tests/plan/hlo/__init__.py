"""Tests of moejax.plan.hlo."""
