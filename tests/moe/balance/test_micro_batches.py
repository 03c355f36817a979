"""A loss over sets that are spread over micro-batches is the loss over the whole sets."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.certify.batches import B, Case
from moejax.certify.oracle import balance as oracle_balance
from moejax.config import frozendict
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
  micro_batch_shares,
  spans_micro_batches,
)
from moejax.moe.routing import Routing, route
from moejax.moe.token_sets import Scope, parts_of_set
from tests.moe.balance.loss_cases import (
  CANCELS,
  SIGMOID,
  VARYING,
  Row,
  cases,
  likely_of,
  routed,
  scope_of,
)
from tests.moe.balance.loss_oracle import chosen_by
from tests.support import oracle
from tests.support.quick import QUICK

# Rows of every loss that spans micro-batches, with switches, and of SimBal, whose W is no
# micro-batch's own.
PARTS = (
  Row('ep_group', 'dispatched'),
  Row('ep_group', 'unbiased', 2, 'softmax'),
  Row('global_batch'),
  Row('global_batch', 'first', 2, 'softmax'),
  Row('gshard'),
  Row('importance'),
  Row('load'),
  Row('micro_batch'),
  Row('router_z'),
  Row('sequence', 'dispatched', 2),
  Row('simbal'),
)


CUT_ANEW = ('gshard', 'micro_batch')  # another loss for another cut, by definition


class Accumulated(NamedTuple):
  """Of each loss, from micro-batches."""

  value: Array  # [n]
  gradient: Array  # [n, B, S, E]
  to_router: Array  # [n, D, E]
  running: Array  # [n, A], each micro-batch's value with the counts so far
  shares: Array  # [n, A]


def cut(a: Array, micro_batches: int) -> Array:
  return jnp.reshape(a, (micro_batches, -1, *a.shape[1:]))


@functools.partial(jax.jit, static_argnames='micro_batches', compiler_options=QUICK)
def accumulate(case: Case, w: Array, micro_batches: int) -> Accumulated:
  """The batch's losses and gradients, from micro-batches.

  Each sees its own tokens, and what `seen` added up.
  """
  mask, segments = cut(case.mask, micro_batches), cut(case.segments, micro_batches)
  rows = B // micro_batches

  def one(row: Row, routing: Routing) -> tuple[Array, Array, Array]:
    loss, scope = BALANCE_LOSSES[row.name], scope_of(row, micro_batches, ep_groups=2)
    part, so_far = micro_batch_shares(row.name, mask, segments, scope), scope
    wholes = {}
    if spans_micro_batches(frozendict({row.name: scope}), rows):
      seen = jax.lax.stop_gradient(jax.vmap(lambda r, m: loss.seen(r, m, scope))(routing, mask))
      n = parts_of_set(scope.rows, rows)
      by_set = seen.reshape(-1, n, seen.shape[-1])
      before = jnp.cumsum(by_set, axis=1) - by_set
      wholes = {'whole': jnp.repeat(by_set.sum(1), n, axis=0), 'so far': before.reshape(seen.shape)}
      so_far = scope._replace(running=True)

    def value(scope: Scope, which: str) -> Array:
      if not wholes:
        return jax.vmap(lambda r, m, s: loss.value(r, m, s, scope))(routing, mask, segments)
      return jax.vmap(lambda r, m, s, whole: loss.value(r, m, s, scope._replace(whole=whole)))(
        routing, mask, segments, wholes[which]
      )

    whole = (part * value(scope, 'whole')).sum()
    running = value(so_far, 'so far') if loss.linear else part
    return whole, running, part

  def all_of(logits: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    whole = likely_of(route(logits, case.bias, SIGMOID))
    routing = jax.tree.map(lambda a: cut(a, micro_batches), whole._replace(router=jnp.zeros(B)))
    routing = routing._replace(router=jnp.broadcast_to(w, (micro_batches, *w.shape)))
    values, running, parts = zip(*(one(row, routing) for row in PARTS))
    return jnp.stack(values), (jnp.stack(running), jnp.stack(parts))

  values, pull, more = jax.vjp(all_of, case.logits, w, has_aux=True)
  return Accumulated(values, *jax.vmap(pull)(jnp.eye(len(PARTS))), *more)


W = np.random.default_rng(4).normal(size=(6, 8)).astype(np.float32)


@functools.cache
def accumulated(label: str, micro_batches: int) -> Accumulated:
  return jax.tree.map(np.asarray, accumulate(cases(8)[label], W, micro_batches))


@pytest.mark.parametrize('micro_batches', [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_add_up_to_the_batch(micro_batches: int) -> None:
  """Values and gradients add up.

  Also of what is not linear in its tokens, and of micro-batches that hold none.
  """
  for label in cases(8):
    whole, parts = accumulated(label, 1), accumulated(label, micro_batches)
    for i, row in enumerate(PARTS):
      about = f'{label} {row}'
      total = parts.shares[i].sum()
      assert abs(total - 1) < 1e-6 or (total == 0 and label == 'nothing'), about
      if row.name in CUT_ANEW or (row.name == 'simbal' and not total):
        continue
      np.testing.assert_allclose(
        parts.value[i], whole.value[i], rtol=1e-6, atol=1e-7 * (row.name in VARYING), err_msg=about
      )
      for got, want in (
        (parts.gradient[i], whole.gradient[i]),
        (parts.to_router[i], whole.to_router[i]),
      ):
        np.testing.assert_allclose(
          got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max() + CANCELS, err_msg=about
        )


@pytest.mark.slow
def test_sets_that_are_cut_are_the_oracles_for_every_cut() -> None:
  """Also of the losses that are, by definition, others for another cut."""
  for label, micro_batches in itertools.product(('holes', 'padded', 'nothing'), (1, 2, 4)):
    case, found = cases(8)[label], accumulated(label, micro_batches)
    ids = np.asarray(routed(case.logits, case.bias, SIGMOID).expert_ids)
    for row, value in zip(PARTS, found.value, strict=True):
      if row.name in oracle_balance.SETS:
        sets = oracle_balance.sets_of(
          row.name, case.segments, micro_batches=micro_batches, ep_groups=2
        )
        want = oracle_balance.mean_over_sets(
          oracle_balance.probability_losses(
            oracle.probabilities(case.logits, row.probability or 'sigmoid'),
            chosen_by(row, case, SIGMOID, ids),
            case.mask,
            sets,
            row.partition,
          )
        )
        np.testing.assert_allclose(value, want, rtol=1e-6, err_msg=f'{label} {micro_batches} {row}')


@pytest.mark.parametrize('label', ['holes', 'padded'])
def test_a_buffer_holds_the_micro_batches_so_far(label: str) -> None:
  """f of all tokens of the set up to this micro-batch, P of its own (2501.11873, Algorithm 1)."""
  case, found = cases(8)[label], accumulated(label, 4)
  ids = np.asarray(routed(case.logits, case.bias, SIGMOID).expert_ids)
  for row, running in zip(PARTS, found.running, strict=True):
    if row.name not in ('ep_group', 'global_batch'):
      continue
    p = oracle.probabilities(case.logits, row.probability or 'sigmoid')
    chosen = chosen_by(row, case, SIGMOID, ids)
    rows_of_set = 2 if row.name == 'ep_group' else 4
    for m in range(4):
      first = m // rows_of_set * rows_of_set
      counts = oracle_balance.load(chosen[first : m + 1], case.mask[first : m + 1], 8).reshape(
        row.partition or 8, -1
      )
      f = counts.sum(1) / counts.sum() * len(counts) if counts.any() else np.ones(len(counts))
      mean = p[m][case.mask[m]].mean(0).reshape(len(counts), -1).sum(1) if case.mask[m].any() else 0
      np.testing.assert_allclose(running[m], (f * mean).sum(), rtol=1e-6, err_msg=f'{row} {m}')


def test_oracle_of_parts_is_the_oracle_of_the_whole() -> None:
  for name, (label, case) in itertools.product(
    ('sequence', 'micro_batch', 'global_batch'), cases(4).items()
  ):
    ids = oracle.route(case.logits, case.bias, top_k=2, score_fn='sigmoid').expert_ids
    for micro_batches in (1, 2, 4):
      kw = {'score_fn': 'sigmoid', 'assignment': 'unbiased', 'micro_batches': micro_batches}
      args = (name, case.logits, ids, case.mask, case.segments)
      np.testing.assert_allclose(
        oracle_balance.accumulated_balance_loss(*args, **kw),
        oracle_balance.loss(*args, **kw),
        rtol=1e-12,
        err_msg=label,
      )
