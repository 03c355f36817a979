"""Tests of moejax/data/formats."""
