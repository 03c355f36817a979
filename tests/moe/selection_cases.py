"""A batch whose rows are the cases of a selection, and every selection measured on it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route
from moejax.moe.selection import (
  SELECTIONS,
  Tokens,
)
from tests.support.quick import QUICK

S, E, K = 6, 4, 2


# Each row of the batch is a case: selections look at no more than a row.
CASES = (
  'plain',
  'padded',
  'holes',
  'ties',
  'extreme',
  'equal',
  'nothing counts',
  'one counts',
  'skewed',
  'low',
)


B = len(CASES)


WEIGHING = {
  'scores': RouterConfig(renormalise=False),
  'renormalised': RouterConfig(scale=2.5),
  'softmax after': RouterConfig(weigh='softmax', scale=0.5),
}


everywhere = pytest.mark.parametrize('name', sorted(SELECTIONS))


def batch() -> tuple[np.ndarray, np.ndarray, Tokens]:
  """Logits [B, S, E], a bias that decides, and the tokens."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(B, S, E))
  z[CASES.index('ties')] = rng.integers(0, 2, (S, E))
  z[CASES.index('extreme')] = rng.choice([-1e4, 0, 1e4], (S, E))
  z[CASES.index('equal')] = 0
  z[CASES.index('skewed')] += [4, 2, 0, -2]
  z[CASES.index('low')] -= 50
  mask = np.ones((B, S), bool)
  mask[CASES.index('padded'), 4:] = False
  mask[CASES.index('holes'), [0, 3, 4]] = False
  mask[CASES.index('nothing counts')] = False
  mask[CASES.index('one counts')] = np.arange(S) == 2
  ids = rng.integers(0, 50_000, (B, S)).astype(np.int32)
  tokens = Tokens(ids, mask, mask.astype(np.int32), np.arange(B, dtype=np.int32))
  return z.astype(np.float32), rng.normal(size=E).astype(np.float32), tokens


class Measured(NamedTuple):
  routing: Routing
  from_weights: tuple[Array, Array]  # gradient of Σ weights · to_weights to (logits, bias)
  from_probs: tuple[Array, Array]


def config(name: str, score_fn: str, weighing: str) -> RouterConfig:
  cfg = WEIGHING[weighing]
  return RouterConfig(E, K, score_fn, 1, 1, cfg.renormalise, cfg.scale, cfg.weigh, selection=name)


def weighing_of(name: str, score_fn: str) -> str:
  """In turns, so that every selection and every score function meets every way to weigh."""
  turn = sorted(SELECTIONS).index(name) + sorted(SCORE_FNS).index(score_fn)
  return list(WEIGHING)[turn % len(WEIGHING)]


def to_weights(name: str) -> np.ndarray:
  places = E if name == 'expert_choice' else K
  return np.random.default_rng(1).normal(size=(B, S, places)).astype(np.float32)


TO_PROBS = np.random.default_rng(2).normal(size=(B, S, E)).astype(np.float32)


def measure(logits: Array, bias: Array, tokens: Tokens, to: Array, cfg: RouterConfig) -> Measured:
  """The routing, and the gradients through weights and probs."""
  routing, pull = jax.vjp(lambda z, b: route(z, b, cfg, tokens), logits, bias)
  nothing = jax.tree.map(
    lambda x: jnp.zeros_like(x) if x.dtype == jnp.float32 else np.zeros(x.shape, jax.dtypes.float0),
    routing,
  )
  return Measured(
    routing, pull(nothing._replace(weights=to)), pull(nothing._replace(probs=TO_PROBS))
  )


@functools.partial(jax.jit, static_argnames='name', compiler_options=QUICK)
def measure_all(logits: Array, bias: Array, tokens: Tokens, name: str) -> dict[str, Measured]:
  """One program a selection, of all score functions."""
  return {
    score_fn: measure(
      logits, bias, tokens, to_weights(name), config(name, score_fn, weighing_of(name, score_fn))
    )
    for score_fn in SCORE_FNS
  }


@functools.cache
def measured(name: str) -> dict[str, Measured]:
  return jax.device_get(measure_all(*batch(), name))
