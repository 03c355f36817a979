"""Compiler options for tests: programs run once or twice, so that compiling is all the time."""

from moejax.certify.cases import cheapest

QUICK = cheapest()
