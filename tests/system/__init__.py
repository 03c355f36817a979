"""Tests of whole commands as real processes."""
