"""Batches, routers and losses with their switches: what the tests of balance losses are run on."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.certify.batches import MIXED, PACKED, PADDED, WHOLE, B, Case, S
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
)
from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route
from moejax.moe.token_sets import Scope
from tests.support.quick import QUICK

MICRO_BATCHES, EP_GROUPS = 2, 4


PROBABILITIES = ('', 'sigmoid', 'softmax')


# The losses that heed all switches.
SWITCHED = ('ep_group', 'global_batch', 'micro_batch', 'sequence')


VARYING = ('importance', 'load')


# Where f is 1 for all the gradient is 0, as a difference of float32 numbers of about 0.1 a token.
CANCELS = 3e-9


class Row(NamedTuple):
  """A loss and its switches."""

  name: str
  assignment: str = 'unbiased'
  partition: int = 0
  probability: str = ''


# What has no switches stands alone; SimBal, which does not look at a token, has a test of its own.
OTHERS = tuple(Row(name) for name in (*VARYING, 'router_z'))


GSHARD = tuple(
  Row('gshard', 'unbiased', *rest) for rest in itertools.product((0, 2), PROBABILITIES)
)


EVERY = tuple(
  Row(*row) for row in itertools.product(SWITCHED, sorted(ASSIGNMENTS), (0, 2), PROBABILITIES)
)


# Every pair of a loss with a switch, and of a switch with another: what is compiled where time is
# short.
PAIRS = tuple(
  Row(name, assignment, (i + j) % 2 * 2, PROBABILITIES[(i + j) % 3])
  for i, name in enumerate(SWITCHED)
  for j, assignment in enumerate(sorted(ASSIGNMENTS))
)


QUICKLY, ALL = (*PAIRS, *GSHARD[2:4], *OTHERS), (*EVERY, *GSHARD, *OTHERS)


def router(num_experts: int, top_k: int, score_fn: str) -> RouterConfig:
  """Two groups of which one is kept: what is dispatched is not what the scores alone would choose.

  One expert is weighed by its score: renormalised, its weight would be 1 whatever the router says.
  """
  groups = 2 if top_k <= num_experts // 2 else 1
  return RouterConfig(
    num_experts, top_k, score_fn, num_groups=groups, top_groups=1, renormalise=top_k > 1
  )


MAIN = [router(8, 2, score_fn) for score_fn in sorted(SCORE_FNS)]


SIGMOID = MAIN[0]


assert SIGMOID.score_fn == 'sigmoid'


routers = functools.partial(
  pytest.mark.parametrize, 'cfg', ids=lambda cfg: f'{cfg.score_fn}-{cfg.num_experts}-{cfg.top_k}'
)


routed = jax.jit(route, static_argnames='cfg', compiler_options=QUICK)


@functools.cache
def cases(num_experts: int, stretch: int = 1) -> dict[str, Case]:
  """Batches by what is unusual about them; `stretch` tokens for each one of the tables above."""
  rng = np.random.default_rng(num_experts)
  whole, padded, packed, mixed = (
    np.repeat(table, stretch, axis=1) for table in (WHOLE, PADDED, PACKED, MIXED)
  )
  shape = (*whole.shape, num_experts)
  bias = rng.normal(scale=0.3, size=num_experts).astype(np.float32)
  plain = rng.normal(size=shape).astype(np.float32)
  ahead, avoided = plain.copy(), plain.copy()
  ahead[..., 1], avoided[..., 0] = 50, -20
  # Also tokens inside a document that do not count, and a document of which no token does.
  holes = (mixed > 0) & (rng.random(mixed.shape) < 0.8)
  holes[0, 3 * stretch : 7 * stretch] = False
  single = np.zeros(mixed.shape, bool)
  single[1, 2] = True
  return {
    'plain': Case(plain, np.zeros_like(bias), whole > 0, whole),
    'padded': Case(2 * plain, bias, padded > 0, padded),
    'packed': Case(plain, bias, packed > 0, packed),
    'holes': Case(plain, bias, holes, mixed),
    'ties': Case(
      rng.integers(0, 2, shape).astype(np.float32), np.zeros_like(bias), mixed > 0, mixed
    ),
    'equal': Case(np.zeros(shape, np.float32), bias, mixed > 0, mixed),
    'extreme': Case(rng.choice([-1e4, 0, 1e4], shape).astype(np.float32), bias, mixed > 0, mixed),
    'all to one': Case(ahead, bias, mixed > 0, mixed),
    'one unchosen': Case(avoided, np.zeros_like(bias), mixed > 0, mixed),
    'low': Case(plain - 50, np.zeros_like(bias), mixed > 0, mixed),
    'single': Case(plain, bias, single, packed),
    'nothing': Case(plain, bias, np.zeros(mixed.shape, bool), padded),
  }


def scope_of(row: Row, micro_batches: int = MICRO_BATCHES, ep_groups: int = EP_GROUPS) -> Scope:
  return Scope(
    BALANCE_LOSSES[row.name].rows(B, micro_batches, ep_groups),
    row.partition,
    row.assignment,
    row.probability,
  )


def likely_of(routing: Routing) -> Routing:
  """P(chosen | noise) is the sigmoid of the logits here: how noise makes one is not the matter."""
  return routing._replace(likely=jax.nn.sigmoid(routing.logits))


@functools.partial(jax.jit, static_argnames=('cfg', 'table'), compiler_options=QUICK)
def measure(
  logits: Array,
  bias: Array,
  mask: Array,
  segments: Array,
  cfg: RouterConfig,
  table: tuple[Row, ...] = QUICKLY,
) -> tuple[Array, Array, Array, Routing]:
  """Every loss of a table: values [n], gradients to logits [n, B, S, E] and to the bias [n, E]."""

  def losses(logits: Array, bias: Array) -> tuple[Array, Routing]:
    routing = likely_of(route(logits, bias, cfg))
    return jnp.stack(
      [BALANCE_LOSSES[row.name].value(routing, mask, segments, scope_of(row)) for row in table]
    ), routing

  values, pull, routing = jax.vjp(losses, logits, bias, has_aux=True)
  return values, *jax.vmap(pull)(jnp.eye(len(table))), routing


@functools.cache
def measured(
  cfg: RouterConfig, case: str, table: tuple[Row, ...] = QUICKLY, stretch: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routing]:
  return jax.tree.map(np.asarray, measure(*cases(cfg.num_experts, stretch)[case], cfg, table))


def balanced() -> Case:
  """Every document gives every expert the same count, also of first choices.

  Probabilities are far from even.
  """
  logits = np.random.default_rng(0).normal(scale=0.3, size=(B, S, 8)).astype(np.float32)
  for t, k in itertools.product(range(S), range(2)):
    # Both choices in one group of experts, because only one group is kept.
    logits[:, t, t % 2 * 4 + (t // 2 + k) % 4] += 5 - k
  return Case(logits, np.zeros(8, np.float32), np.ones((B, S), bool), np.ones((B, S), np.int32))
