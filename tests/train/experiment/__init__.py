"""Tests of moejax.train.experiment."""
