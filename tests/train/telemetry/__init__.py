"""Tests of moejax.train.telemetry."""
