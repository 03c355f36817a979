"""What the equations say, under one name: slow, plain float64 NumPy, never written from moejax.

Loops over tokens and experts stand where the equation has a sum; nothing here is meant to be fast.
An equation number is cited only where the paper was read; what is derived says so. Routing, balance
and the bias rules are in `moejax/certify/oracle/`, which the certificate carries with it; the rest
is next to this file.
"""

from moejax.certify.oracle.balance import *
from moejax.certify.oracle.bias import *
from moejax.certify.oracle.optimizer import *
from moejax.certify.oracle.routing import *
from moejax.certify.oracle.selection import *
from tests.support.oracle_attention import *
from tests.support.oracle_experts import *
from tests.support.oracle_training import *
