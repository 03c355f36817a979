"""The losses that are f times P: what leading codebases got wrong, and what they are by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.batches import PACKED, B, S
from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
)
from moejax.moe.routing import RouterConfig, route
from moejax.moe.token_sets import Scope
from tests.moe.balance.loss_cases import (
  CANCELS,
  MAIN,
  QUICKLY,
  SIGMOID,
  SWITCHED,
  VARYING,
  Row,
  balanced,
  cases,
  measure,
  measured,
  routers,
)
from tests.moe.balance.loss_oracle import log_scores, members, normalised
from tests.support import oracle
from tests.support.quick import QUICK


def old_maxtext_loss(logits: Array, mask: Array, cfg: RouterConfig) -> Array:
  """What a P of renormalised top-k weights, scattered into zeros, gives for one set.

  It is wrong on purpose.
  """
  routing = route(logits, jnp.zeros(cfg.num_experts), cfg)
  chosen = jax.nn.one_hot(routing.expert_ids, cfg.num_experts) * mask[..., None, None]
  f = chosen.sum((0, 1, 2)) * cfg.num_experts / (cfg.top_k * mask.sum())
  p = (chosen * routing.weights[..., None]).sum((0, 1, 2)) / mask.sum()
  return (jax.lax.stop_gradient(f) * p).sum()


def test_founding_correction_maxtext_full_softmax_before_top_k() -> None:
  """The loss sees the softmax over all experts.

  Every expert's logit gets a gradient, chosen or not.
  """
  cfg, no_bias = RouterConfig(8, 2, 'softmax'), jnp.zeros(8)
  logits, _, mask, segments = cases(8)['plain']

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(z: Array) -> tuple:
    new = jax.value_and_grad(
      lambda z: BALANCE_LOSSES['global_batch'].value(route(z, no_bias, cfg), mask, segments)
    )
    return (
      new(z),
      jax.value_and_grad(old_maxtext_loss)(z, mask, cfg),
      route(z, no_bias, cfg).expert_ids,
    )

  (value, gradient), (old_value, old), ids = jax.tree.map(np.asarray, both(logits))
  chosen = members(ids, 8) > 0
  assert (gradient != 0).all()
  assert (np.abs(old[~chosen]) < 1e-6 * np.abs(old).max()).all(), 'the old way reached the others'
  # A third and more of what moves the router was missing, and the rest pointed elsewhere.
  assert np.linalg.norm(gradient[~chosen]) > 0.3 * np.linalg.norm(gradient)
  assert (gradient * old).sum() < 0.9 * np.linalg.norm(gradient) * np.linalg.norm(old)
  full = oracle_balance.loss(
    'global_batch', logits, ids, mask, segments, score_fn='softmax', assignment='dispatched'
  )
  np.testing.assert_allclose(value, full, rtol=1e-6)
  assert abs(old_value - full) > 1e-2


def test_founding_correction_megatron_normalised_sigmoid() -> None:
  """For sigmoid scores P is the sigmoid normalised over all experts, not a softmax."""
  cfg, no_bias = RouterConfig(8, 2, 'sigmoid'), jnp.zeros(8)
  logits, _, mask, segments = cases(8)['packed']

  def new_and_old(z: Array) -> Array:
    routing = route(z, no_bias, cfg)
    wrong = routing._replace(probs=jax.nn.softmax(z))
    return jnp.stack(
      [BALANCE_LOSSES['sequence'].value(r, mask, segments) for r in (routing, wrong)]
    )

  values, gradients = jax.jit(
    lambda z: (new_and_old(z), jax.jacrev(new_and_old)(z)), compiler_options=QUICK
  )(logits)
  ids = oracle.route(logits, no_bias, top_k=2, score_fn='sigmoid').expert_ids
  want = [
    oracle_balance.loss(
      'sequence', logits, ids, mask, segments, score_fn=score_fn, assignment='dispatched'
    )
    for score_fn in ('sigmoid', 'softmax')
  ]
  np.testing.assert_allclose(values, want, rtol=1e-6)
  assert abs(want[0] - want[1]) > 0.02
  assert np.linalg.norm(gradients[0] - gradients[1]) > 0.3 * np.linalg.norm(gradients[0])
  # By hand: one token, scores 0.8 and 0.2 of which the first is chosen: f = (2, 0) and
  # P = 0.8 / (0.8 + 0.2).
  by_hand = jax.jit(
    lambda z: BALANCE_LOSSES['sequence'].value(
      route(z, jnp.zeros(2), RouterConfig(2, 1, 'sigmoid')),
      np.ones((1, 1), bool),
      np.ones((1, 1), np.int32),
    ),
    compiler_options=QUICK,
  )(np.log(np.array([[[4.0, 0.25]]], np.float32)))
  np.testing.assert_allclose(by_hand, 1.6, rtol=1e-6)


CANONICAL = np.array([row.name not in (*VARYING, 'router_z') for row in QUICKLY])


@routers(MAIN)
def test_one_at_perfect_balance_however_small_the_scores(cfg: RouterConfig) -> None:
  case = balanced()
  for shift in (0, 3, -50, -80):
    values = np.asarray(measure(case.logits + np.float32(shift), *case[1:], cfg)[0])
    np.testing.assert_allclose(values[CANONICAL], 1.0, rtol=1e-6)


@routers(MAIN)
def test_all_tokens_to_k_experts_costs_the_most(cfg: RouterConfig) -> None:
  """E/K, or E for first choices, where P follows; M for groups.

  For what varies: all / mean - 1, squared, on average.
  """
  logits = np.full((B, S, 8), -60, np.float32)
  logits[..., 0], logits[..., 1] = 60, 59
  values = np.asarray(measure(logits, *cases(8)['plain'][1:], cfg)[0])
  for row, value in zip(QUICKLY, values, strict=True):
    if row.name not in SWITCHED:
      continue
    p = normalised(
      log_scores(np.array([60.0, 59.0] + [-60.0] * 6), row.probability or cfg.score_fn)
    )
    first = row.assignment == 'first'
    want = 2.0 if row.partition else 8 * p[0] if first else 4.0
    np.testing.assert_allclose(value, want, rtol=1e-6, err_msg=str(row))
  # All weight, and all expectations, on two of eight: sums of 4, 4 and six times 0 by their mean.
  even = np.asarray(measure(np.minimum(logits, 59), *cases(8)['plain'][1:], cfg)[0])
  for name in VARYING:
    np.testing.assert_allclose(even[QUICKLY.index(Row(name))], 3.0, rtol=1e-6, err_msg=name)


def test_a_packed_row_is_the_mean_of_its_documents() -> None:
  cfg, case = SIGMOID, cases(8)['holes']
  rows = np.array([row.name == 'sequence' for row in QUICKLY])
  alone = [
    np.asarray(
      measure(
        case.logits,
        case.bias,
        case.mask & (np.arange(B)[:, None] == b) & (case.segments == s),
        case.segments,
        cfg,
      )[0]
    )[rows]
    for b in range(B)
    for s in range(1, S)
    if (case.mask[b] & (case.segments[b] == s)).any()
  ]
  assert len(alone) == 7
  np.testing.assert_allclose(measured(cfg, 'holes')[0][rows], np.mean(alone, axis=0), rtol=1e-6)
  # One document is one row, wherever it lies and whatever lies beside it.
  unpacked = np.zeros((B, S), np.int32)
  unpacked[0, :3] = unpacked[1, :4] = unpacked[2, :1] = 1
  moved = np.zeros_like(case.logits)
  moved[0, :3], moved[1, :4], moved[2, :1] = (
    case.logits[0, a:b] for a, b in ((0, 3), (3, 7), (7, 8))
  )
  first_row = (np.arange(B)[:, None] == 0) & (PACKED > 0)
  first = measure(case.logits, case.bias, first_row, PACKED, cfg)[0][rows]
  apart = measure(moved, case.bias, unpacked > 0, unpacked, cfg)[0][rows]
  np.testing.assert_allclose(apart, first, rtol=1e-6)


def test_counts_of_nothing_are_an_even_f() -> None:
  """Tokens that are unassigned, and a lagged f at the first step.

  L is 1, whatever P is, and nothing pulls.
  """
  case, no_bias = cases(4)['plain'], jnp.zeros(4)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(z: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def unassigned(z: Array) -> Array:
      routing = route(z, no_bias, RouterConfig(4, 2))
      routing = routing._replace(expert_ids=jnp.full_like(routing.expert_ids, 4))
      return BALANCE_LOSSES['sequence'].value(
        routing, case.mask, case.segments, Scope(0, 0, 'dispatched')
      )

    def unknown(z: Array) -> Array:
      routing, scope = route(z, no_bias, RouterConfig(4, 2)), Scope(8, 2, whole=jnp.zeros(4))
      return BALANCE_LOSSES['global_batch'].value(routing, case.mask, case.segments, scope)

    return jax.value_and_grad(unassigned)(z), jax.value_and_grad(unknown)(z)

  for value, gradient in both(case.logits):
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=CANCELS)
