"""Proof that routing and balance are right: `python -m moejax.certify`."""
