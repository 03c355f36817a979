"""Checks that passed and that failed, a certificate of them, and what is said in one."""

import functools

from moejax import certify
from moejax.certify.checks import Certificate, Check, Result

GOOD = Check('values', 2e-7, 1e-6, 'rounding', 'E8', 5)
EXACT = Check('counts', 0, 0, 'whole', 'E4', 3)
BAD = Check('counts', 1, 0, 'whole', 'E4', 3)
NOTHING = Check('counts', 0, 1, 'whole', 'no case', 0)  # it looked at no case


def certificate(*checks: Check) -> Certificate:
  """A certificate of one line with these checks."""
  about = {
    'command': 'c',
    'seconds': 1.5,
    'devices': '8 x cpu',
    'commit': 'unknown',
    'seed': 0,
    'versions': {'jax': '1'},
    'covered': {'losses': ['sequence']},
  }
  return Certificate([Result('oracle', 1, 'is its equation', checks, 2.0, ('a note',))], about)


certify_quietly = functools.partial(certify.check, quiet=True)


def said(certificate: Certificate) -> str:
  """All notes, and where each check that failed was worst."""
  found = []
  for result in certificate.results:
    found += [*result.notes, *(each.where for each in result.checks if not each.passed)]
  return '\n'.join(found)


def failed(certificate: Certificate) -> set[str]:
  """The names of the lines that do not hold."""
  return {result.name for result in certificate.results if not result.passed}
