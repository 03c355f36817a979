"""Proof that routing and balance are right: `python -m moejax.certify`, and `check` for others.

No jax is imported here: the command sets its environment first, and `check` needs none.
"""

from moejax.certify.foreign.certificate import certify_function as check

__all__ = ['check']
