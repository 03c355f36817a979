"""Tests of moejax.moe.balance."""
