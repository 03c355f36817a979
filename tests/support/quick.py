"""How tests compile: programs run once or twice, so compiling is all the time."""

from moejax.certify.cases import cheapest

QUICK = cheapest()
