"""Balance losses against the oracle, values and gradients, and what must leave them as they are."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.certify.cases import MIXED, PACKED, PADDED, WHOLE, B, Case, S
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import codebases as oracle_codebases
from moejax.config import ConfigError, frozendict
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.config import ACCUMULATIONS, BalanceConfig, router_problems
from moejax.moe.balance.losses import (
  BALANCE_LOSSES,
  CODEBASES,
  convert_coefficient,
  micro_batch_shares,
  spans_micro_batches,
)
from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route
from moejax.moe.token_sets import Scope, expert_load, parts_of_set
from tests.support import oracle
from tests.support.quick import QUICK

MICRO_BATCHES, EP_GROUPS = 2, 4
PROBABILITIES = ('', 'sigmoid', 'softmax')
SWITCHED = (
  'ep_group',
  'global_batch',
  'micro_batch',
  'sequence',
)  # the losses that heed all switches
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
# Every pair of a loss with a switch, and of a switch with another: what is compiled where time is short.
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
# Each number of experts and each K with every score function.
SHAPES = [
  router(e, k, sorted(SCORE_FNS)[i % 3])
  for i, (e, k) in enumerate(itertools.product((4, 8, 64, 256), (1, 2, 8)))
  if k <= e
]
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
  holes = (mixed > 0) & (
    rng.random(mixed.shape) < 0.8
  )  # also tokens inside a document that do not count
  holes[0, 3 * stretch : 7 * stretch] = False  # and a document of which no token does
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


# The oracle, many tokens at a time, and many losses at one point: the same sums as moejax/certify/oracle_balance.py.


def log_scores(z: np.ndarray, score_fn: str) -> np.ndarray:
  if score_fn == 'softmax':
    return z - np.logaddexp.reduce(z, -1, keepdims=True)
  if score_fn == 'sigmoid':
    return -np.logaddexp(0, -z)
  return np.where(z < -37, z, np.log(np.logaddexp(0, np.maximum(z, -37)))) / 2


def members(ids: np.ndarray, num_experts: int) -> np.ndarray:
  """How often each expert is among a token's. [B, S, K] -> [B, S, E]."""
  return (ids[..., None] == np.arange(num_experts)).sum(-2).astype(np.float64)


def normalised(log_s: np.ndarray) -> np.ndarray:
  return np.exp(log_s - np.logaddexp.reduce(log_s, -1, keepdims=True))


def squared_variation(values: np.ndarray, mask: np.ndarray) -> float:
  sums = values[mask].sum(0)
  return float(sums.var() / sums.mean() ** 2) if sums.any() else 0.0


def by_sets(
  p: np.ndarray, chosen: np.ndarray, mask: np.ndarray, sets: np.ndarray, partition: int
) -> float:
  """Mean over the sets that are not empty of the sum of f P. p, chosen [B, S, E]."""
  of_set = ((sets == np.arange(sets.max(initial=0) + 1)[:, None, None]) & mask).astype(
    np.float64
  )  # [G, B, S]
  tokens = of_set.sum((1, 2))
  of_set = of_set[tokens > 0]
  if not len(of_set):
    return 0.0
  mean_p, counts = (np.einsum('gbs,bse->ge', of_set, a) for a in (p, chosen))
  groups = partition or p.shape[-1]
  mean_p, counts = (
    a.reshape(len(a), groups, -1).sum(-1) for a in (mean_p / tokens[tokens > 0][:, None], counts)
  )
  return float((groups * counts / counts.sum(1, keepdims=True) * mean_p).sum(1).mean())


def chosen_by(row: Row, case: Case, cfg: RouterConfig, expert_ids: np.ndarray) -> np.ndarray:
  assignment = 'first' if row.name == 'gshard' else row.assignment
  return oracle_balance.assignment_of(case.logits, expert_ids, cfg.score_fn, assignment)


def wanted(
  table: tuple[Row, ...], case: Case, cfg: RouterConfig, expert_ids: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """Logits -> the value of every loss; f has no gradient: the choice is fixed."""
  counts = {row: members(chosen_by(row, case, cfg, expert_ids), cfg.num_experts) for row in table}
  sets = {
    row.name: oracle_balance.sets_of(
      row.name, case.segments, micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS
    )
    for row in table
    if row.name in oracle_balance.SETS
  }

  def of(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    p = {name: normalised(log_scores(z, name or cfg.score_fn)) for name in PROBABILITIES}
    log_s = log_scores(z, cfg.score_fn)
    used = members(expert_ids, cfg.num_experts) > 0
    gates = np.where(
      used, normalised(np.where(used, log_s, -np.inf)) if cfg.renormalise else np.exp(log_s), 0
    )
    others = {
      'importance': lambda: squared_variation(gates, case.mask),
      'load': lambda: squared_variation(np.exp(log_scores(z, 'sigmoid')), case.mask),
      'router_z': lambda: (
        (np.logaddexp.reduce(z, -1) ** 2)[case.mask].sum() / max(case.mask.sum(), 1)
      ),
    }
    return np.array(
      [
        others[row.name]()
        if row.name in others
        else by_sets(p[row.probability], counts[row], case.mask, sets[row.name], row.partition)
        for row in table
      ]
    )

  return of


def one_by_one(row: Row, case: Case, cfg: RouterConfig, ids: np.ndarray) -> float:
  """The value of a loss by the loops of the oracle."""
  if row.name == 'importance':
    logs = oracle.log_scores(case.logits, cfg.score_fn)
    return oracle_balance.importance(
      oracle.weigh_chosen(logs, ids), ids, case.mask, cfg.num_experts
    )
  if row.name == 'load':
    return oracle_balance.smooth_load(oracle.scores(case.logits, 'sigmoid'), case.mask)
  if row.name == 'router_z':
    return oracle_balance.router_z(case.logits, case.mask)
  sets = oracle_balance.sets_of(
    row.name, case.segments, micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS
  )
  p = oracle.probabilities(case.logits, row.probability or cfg.score_fn)
  return oracle_balance.mean_over_sets(
    oracle_balance.probability_losses(
      p, chosen_by(row, case, cfg, ids), case.mask, sets, row.partition
    )
  )


@routers(MAIN)
def test_the_oracle_of_many_tokens_is_the_oracle(cfg: RouterConfig) -> None:
  for label, case in cases(8).items():
    ids = oracle.route(
      case.logits, case.bias, top_k=2, score_fn=cfg.score_fn, num_groups=2
    ).expert_ids
    for row, found in zip(QUICKLY, wanted(QUICKLY, case, cfg, ids)(case.logits), strict=True):
      np.testing.assert_allclose(
        found, one_by_one(row, case, cfg, ids), rtol=1e-10, atol=1e-12, err_msg=f'{label} {row}'
      )


def check_against_oracle(cfg: RouterConfig, table: tuple[Row, ...], stretch: int = 1) -> None:
  for label, case in cases(cfg.num_experts, stretch).items():
    values, gradients, to_bias, routing = measured(cfg, label, table, stretch)
    ids = oracle.route(
      case.logits,
      case.bias,
      top_k=cfg.top_k,
      score_fn=cfg.score_fn,
      num_groups=cfg.num_groups,
      top_groups=1,
    ).expert_ids
    np.testing.assert_array_equal(routing.expert_ids, ids)
    f = wanted(table, case, cfg, ids)
    direction = np.random.default_rng(1).normal(size=case.logits.shape)
    slopes = oracle.slope(f, case.logits, direction)
    for row, value, gradient, want, slope in zip(
      table, values, gradients, f(case.logits), slopes, strict=True
    ):
      about = f'{label} {row}'
      # What varies around 0 is a difference of numbers near 1, and so exact: to 1e-7 of them.
      np.testing.assert_allclose(
        value, want, rtol=1e-6, atol=1e-7 * (row.name in VARYING), err_msg=about
      )
      gradient = gradient.astype(np.float64)
      np.testing.assert_allclose(
        (gradient * direction).sum(),
        slope,
        rtol=1e-5,
        atol=1e-5 * np.linalg.norm(gradient) + 3e-8,
        err_msg=about,
      )
      assert not gradient[~case.mask].any(), f'{about}: a token that does not count has a gradient'
    assert not to_bias.any(), f'{label}: the bias has a gradient'


@routers(MAIN)
def test_value_and_gradient_are_the_oracles(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, QUICKLY)


@pytest.mark.slow
@routers(MAIN)
def test_every_switch_of_every_loss_with_every_other(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, ALL)


@pytest.mark.slow
@routers(SHAPES)
def test_every_shape(cfg: RouterConfig) -> None:
  check_against_oracle(cfg, QUICKLY, stretch=max(1, cfg.num_experts // 32))


def test_all_losses_are_looked_at() -> None:
  assert (
    {row.name for row in QUICKLY} | {'simbal'}
    == {row.name for row in ALL} | {'simbal'}
    == set(BALANCE_LOSSES)
  )
  for one, other in itertools.combinations(range(4), 2):
    assert {(row[one], row[other]) for row in PAIRS} == {(row[one], row[other]) for row in EVERY}, (
      one,
      other,
    )
  assert len(set(EVERY)) == 4 * 3 * 2 * 3


@routers(MAIN)
def test_every_entry_of_the_gradient_is_the_finite_difference(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  _, gradients, _, routing = measured(cfg, 'holes')
  f = wanted(QUICKLY, case, cfg, routing.expert_ids)
  want = np.zeros(gradients.shape)
  for at in zip(*np.nonzero(np.broadcast_to(case.mask[..., None], case.logits.shape))):
    step = np.zeros(case.logits.shape)
    step[at] = 1
    want[(slice(None), *at)] = oracle.slope(f, case.logits, step)
  for row, got, one in zip(QUICKLY, gradients, want, strict=True):
    np.testing.assert_allclose(
      got, one, rtol=1e-5, atol=1e-5 * np.abs(one).max() + CANCELS, err_msg=str(row)
    )


def old_maxtext_loss(logits: Array, mask: Array, cfg: RouterConfig) -> Array:
  """What a P of renormalised top-k weights, scattered into zeros, gives for one set. Wrong on purpose."""
  routing = route(logits, jnp.zeros(cfg.num_experts), cfg)
  chosen = jax.nn.one_hot(routing.expert_ids, cfg.num_experts) * mask[..., None, None]
  f = chosen.sum((0, 1, 2)) * cfg.num_experts / (cfg.top_k * mask.sum())
  p = (chosen * routing.weights[..., None]).sum((0, 1, 2)) / mask.sum()
  return (jax.lax.stop_gradient(f) * p).sum()


def test_founding_correction_maxtext_full_softmax_before_top_k() -> None:
  """The loss sees the softmax over all experts; every expert's logit gets a gradient, chosen or not."""
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
  """For sigmoid scores the sequence-wise P is the sigmoid normalised over all experts, not a softmax."""
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
  # By hand: one token, scores 0.8 and 0.2 of which the first is chosen: f = (2, 0), P = 0.8 / (0.8 + 0.2).
  by_hand = jax.jit(
    lambda z: BALANCE_LOSSES['sequence'].value(
      route(z, jnp.zeros(2), RouterConfig(2, 1, 'sigmoid')),
      np.ones((1, 1), bool),
      np.ones((1, 1), np.int32),
    ),
    compiler_options=QUICK,
  )(np.log(np.array([[[4.0, 0.25]]], np.float32)))
  np.testing.assert_allclose(by_hand, 1.6, rtol=1e-6)


def balanced() -> Case:
  """Every document gives every expert the same count, also of first choices; probabilities far from even."""
  logits = np.random.default_rng(0).normal(scale=0.3, size=(B, S, 8)).astype(np.float32)
  for t, k in itertools.product(range(S), range(2)):
    # Both choices in one group of experts, because only one group is kept.
    logits[:, t, t % 2 * 4 + (t // 2 + k) % 4] += 5 - k
  return Case(logits, np.zeros(8, np.float32), np.ones((B, S), bool), np.ones((B, S), np.int32))


CANONICAL = np.array([row.name not in (*VARYING, 'router_z') for row in QUICKLY])


@routers(MAIN)
def test_one_at_perfect_balance_however_small_the_scores(cfg: RouterConfig) -> None:
  case = balanced()
  for shift in (0, 3, -50, -80):
    values = np.asarray(measure(case.logits + np.float32(shift), *case[1:], cfg)[0])
    np.testing.assert_allclose(values[CANONICAL], 1.0, rtol=1e-6)


@routers(MAIN)
def test_all_tokens_to_k_experts_costs_the_most(cfg: RouterConfig) -> None:
  """E/K, or E for first choices, where P follows; groups: M; what varies: all / mean - 1, squared, on average."""
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


def test_what_varies_not_at_all_costs_nothing() -> None:
  """All experts with the same sums, of tokens that are far from indifferent."""
  logits = np.where(
    np.arange(8) == (np.arange(B)[:, None] * S + np.arange(S))[..., None] % 8, 5, -5
  )
  values = np.asarray(measure(logits.astype(np.float32), *balanced()[1:], SIGMOID)[0])
  # Ties among the other seven go to the lowest: importance is even only to what they weigh.
  assert abs(values[QUICKLY.index(Row('load'))]) < 1e-12
  assert values[QUICKLY.index(Row('importance'))] < 1e-3


@routers(MAIN)
def test_renaming_experts_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together
  renamed = measure(case.logits[..., old_name], case.bias[old_name], case.mask, case.segments, cfg)
  np.testing.assert_allclose(renamed[0], values, rtol=1e-6)
  for got, want in zip(renamed[1], gradients[..., old_name], strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max() + CANCELS)


@routers(MAIN)
def test_what_does_not_count_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  garbage = np.random.default_rng(2).normal(scale=17, size=case.logits.shape).astype(np.float32)
  got = measure(np.where(case.mask[..., None], case.logits, garbage), *case[1:], cfg)
  np.testing.assert_array_equal(got[0], values)
  np.testing.assert_array_equal(got[1], gradients)


@pytest.mark.slow
def test_rows_cut_short_are_rows_masked() -> None:
  case = cases(8)['holes']
  masked = case._replace(mask=case.mask & (np.arange(S) < 5))
  cut = Case(*(a[:, :5] if np.ndim(a) > 1 else a for a in masked))
  np.testing.assert_allclose(measure(*cut, SIGMOID)[0], measure(*masked, SIGMOID)[0], rtol=1e-6)


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
  first = measure(case.logits, case.bias, (np.arange(B)[:, None] == 0) & (PACKED > 0), PACKED, cfg)[
    0
  ][rows]
  np.testing.assert_allclose(
    measure(moved, case.bias, unpacked > 0, unpacked, cfg)[0][rows], first, rtol=1e-6
  )


@routers(MAIN)
def test_bias_is_in_no_probability(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients, _, routing = measured(cfg, 'holes')
  other = jax.tree.map(np.asarray, measure(case.logits, -case.bias, case.mask, case.segments, cfg))
  assert not np.array_equal(routing.expert_ids, other[3].expert_ids)
  follows = np.array(
    [row.assignment != 'unbiased' or row.name in ('gshard', 'importance') for row in QUICKLY]
  )
  np.testing.assert_array_equal(values[~follows], other[0][~follows])
  np.testing.assert_array_equal(gradients[~follows], other[1][~follows])
  assert (np.abs(values - other[0])[follows] > 1e-6).all(), 'f does follow what was dispatched'


def test_counts_of_nothing_are_an_even_f() -> None:
  """Tokens that nobody took, and a lagged f at the first step: L is 1, whatever P is, and nothing pulls."""
  case, no_bias = cases(4)['plain'], jnp.zeros(4)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(z: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def nobody(z: Array) -> Array:
      routing = route(z, no_bias, RouterConfig(4, 2))
      routing = routing._replace(expert_ids=jnp.full_like(routing.expert_ids, 4))
      return BALANCE_LOSSES['sequence'].value(
        routing, case.mask, case.segments, Scope(0, 0, 'dispatched')
      )

    def unknown(z: Array) -> Array:
      routing, scope = route(z, no_bias, RouterConfig(4, 2)), Scope(8, 2, whole=jnp.zeros(4))
      return BALANCE_LOSSES['global_batch'].value(routing, case.mask, case.segments, scope)

    return jax.value_and_grad(nobody)(z), jax.value_and_grad(unknown)(z)

  for value, gradient in both(case.logits):
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=CANCELS)


def test_simbal_is_the_l1_distance_of_the_experts_from_orthonormal() -> None:
  rng = np.random.default_rng(0)
  case, no_bias = cases(4)['nothing'], jnp.zeros(4)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def measured_of(w: Array) -> tuple[Array, Array]:
    def value(w: Array) -> Array:
      routing = route(case.logits, no_bias, RouterConfig(4, 2))._replace(router=w)
      return BALANCE_LOSSES['simbal'].value(routing, case.mask, case.segments)

    return jax.value_and_grad(value)(w)

  w = rng.normal(size=(6, 4)).astype(np.float32)
  value, gradient = measured_of(w)
  np.testing.assert_allclose(value, oracle_balance.simbal(w.astype(np.float64)), rtol=1e-6)
  np.testing.assert_allclose(
    gradient, oracle.finite_difference(oracle_balance.simbal, w), rtol=1e-5, atol=1e-6
  )
  orthonormal = np.linalg.qr(rng.normal(size=(6, 4)))[0].astype(np.float32)
  assert measured_of(orthonormal)[0] < 1e-5, 'orthonormal experts cost nothing'
  strange = [measured_of(s * orthonormal) for s in (0.0, 1e4)]
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(strange)) and strange[0][0] == 4


# Micro-batches. The rows of every loss that spans them, with switches, and SimBal, whose W is no micro-batch's own.
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
  """The batch's losses and gradients from micro-batches that each see their own tokens and what `seen` added up."""
  mask, segments, rows = (
    cut(case.mask, micro_batches),
    cut(case.segments, micro_batches),
    B // micro_batches,
  )

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

    return (
      (part * value(scope, 'whole')).sum(),
      value(so_far, 'so far') if loss.linear else part,
      part,
    )

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


@pytest.mark.parametrize('micro_batches', [2, 4])
def test_micro_batches_add_up_to_the_batch(micro_batches: int) -> None:
  """Values and gradients, also of what is not linear in its tokens, and of micro-batches that hold none."""
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
    p, chosen = (
      oracle.probabilities(case.logits, row.probability or 'sigmoid'),
      chosen_by(row, case, SIGMOID, ids),
    )
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


@routers(MAIN)
def test_load_counts_every_copy_of_every_token_that_counts(cfg: RouterConfig) -> None:
  for label, case in cases(cfg.num_experts).items():
    ids = measured(cfg, label)[3].expert_ids
    got = np.asarray(expert_load(ids, case.mask, cfg.num_experts))
    np.testing.assert_array_equal(got, oracle_balance.load(ids, case.mask, cfg.num_experts))
    assert got.sum() == case.mask.sum() * cfg.top_k and got.dtype == np.float32
  nobody = np.where(np.arange(2) == 1, 8, ids)
  assert expert_load(nobody, np.ones((B, S), bool), 8).sum() == B * S, "an id of E is nobody's"


# Coefficients of others.


def layers_of_a_model(alike: bool) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities [L, B, S, E] and expert_ids [L, B, S, K] of three layers; alike in counts, or each its own."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, B, S, 8)) + 2 * rng.normal(size=(1 if alike else 3, 1, 1, 8))
  ids = np.argsort(-logits, axis=-1, kind='stable')[..., :2]
  return normalised(log_scores(logits, 'softmax')), np.broadcast_to(
    ids[:1], ids.shape
  ) if alike else ids


@pytest.mark.parametrize('codebase', sorted(CODEBASES))
def test_a_converted_coefficient_is_the_same_pull(codebase: str) -> None:
  """What each codebase adds to its loss, with its alpha, is what ours adds with the converted one."""
  theirs, scope = oracle_codebases.CODEBASES[codebase]
  probs, ids = layers_of_a_model(
    alike=codebase == 'huggingface'
  )  # which pools layers: only then there is the same
  mask = np.ones((B, S), bool)
  sets = oracle_balance.sets_of(scope or 'global_batch', np.ones((B, S), np.int32))
  ours = np.mean([oracle_balance.probability_losses(p, i, mask, sets) for p, i in zip(probs, ids)])
  alpha = 0.02
  found = convert_coefficient(codebase, alpha, top_k=2, num_moe_layers=3) * ours
  np.testing.assert_allclose(found, alpha * theirs(probs, ids), rtol=1e-12)
  assert abs(ours - 1) > 0.05


def test_hugging_face_pools_layers_and_so_cannot_be_converted_for_layers_that_differ() -> None:
  """Two layers collapsed onto opposite experts are, pooled, a perfect balance: K. Ours sees both collapse: E/K."""
  probs, ids = np.zeros((2, B, S, 4)), np.zeros((2, B, S, 2), int)
  probs[0, ..., :2] = probs[1, ..., 2:] = 0.5
  ids[0], ids[1] = [0, 1], [2, 3]
  sets = oracle_balance.sets_of('global_batch', np.ones((B, S), np.int32))
  ours = [
    oracle_balance.probability_losses(p, i, np.ones((B, S), bool), sets)[0]
    for p, i in zip(probs, ids)
  ]
  np.testing.assert_allclose(ours, 4 / 2)
  np.testing.assert_allclose(
    oracle_codebases.huggingface(probs, ids), 2, err_msg='K, as at balance'
  )


def test_an_unknown_codebase_is_named_with_those_that_are_known() -> None:
  assert set(CODEBASES) == set(oracle_codebases.CODEBASES)
  with pytest.raises(
    ConfigError, match=r"codebase='nemo' is not one of \['huggingface', 'levanter', "
  ):
    convert_coefficient('nemo', 0.1, top_k=2, num_moe_layers=3)


# What does not fit.


def test_config_names_every_problem_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    BalanceConfig(
      frozendict({'sequences': '0.1', 'sequence': '0.1@', 'importance': 0.1}),
      'signs',
      'fast',
      0,
      -1,
      'biased',
      'tanh',
      'approximate',
    )
  want = (
    'losses.sequences is not a balance loss: use one of',
    "losses.sequence='0.1@' is not a schedule: use",
    "bias_rule='signs' is not one of",
    "bias_rate='fast' is not a schedule: use",
    'ep_groups=0: use 1 or more',
    'partition=-1: use 0',
    "probability='tanh' is not one of ['sigmoid', ",
    "assignment='biased' is not one of [",
    f"accumulation='approximate' is not one of {sorted(ACCUMULATIONS)}",
    "accumulation='approximate' is for losses that are linear in P, not losses.importance: use 'exact'",
  )
  assert len(error.value.problems) == len(want)
  for problem, begin in zip(error.value.problems, want, strict=True):
    assert problem.startswith(begin), problem


def test_one_group_is_always_even_and_so_no_partition() -> None:
  with pytest.raises(ConfigError, match='partition=1: use 0 .*one group is always even'):
    BalanceConfig(partition=1)


def test_std_of_share_cannot_train_and_says_why() -> None:
  with pytest.raises(
    ConfigError, match='losses.std_of_share is not a balance loss: .*made of counts, it has no grad'
  ):
    BalanceConfig(frozendict(std_of_share='0.1'))
  with pytest.raises(ConfigError) as error:
    BalanceConfig(frozendict(std_of_shares='0.1'))
  assert 'made of counts' not in str(error.value)


TOP_K, HASH = RouterConfig(8, 2), RouterConfig(8, 2, selection='hash')
GROUPED = RouterConfig(8, 2, num_groups=4, top_groups=2)
NOISY = RouterConfig(8, 2, noisy=True)
SPREAD = frozendict(global_batch='0.1')
MISFITS = {
  'bias ignored': (
    BalanceConfig(bias_rule='sign'),
    HASH,
    1,
    "balance.bias_rule='sign' would move a bias that selection='hash' ignores: use selection='top_k'",
  ),
  'no expert left': (
    BalanceConfig(bias_rule='quantile'),
    RouterConfig(8, 8),
    1,
    "balance.bias_rule='quantile' needs an expert that is not chosen: use top_k below num_experts=8",
  ),
  'no noise': (
    BalanceConfig(frozendict(load='0.1')),
    TOP_K,
    1,
    'balance.losses.load is the load that noise may give: use router.noisy=True, or losses.importance',
  ),
  'noise and bias': (
    BalanceConfig(frozendict(load='0.1'), 'sign'),
    NOISY,
    1,
    "balance.losses.load does not know of a bias: use bias_rule='' instead of 'sign'",
  ),
  'no gradient': (
    BalanceConfig(frozendict(importance='0.1')),
    RouterConfig(8, 1),
    1,
    'balance.losses.importance of weights that are always 1 has no gradient: use router.renorm',
  ),
  'partition': (
    BalanceConfig(partition=3),
    TOP_K,
    1,
    'balance.partition=3 does not divide num_experts=8: use a divisor of it',
  ),
  'lagged': (
    BalanceConfig(SPREAD, accumulation='lagged'),
    TOP_K,
    1,
    "balance.accumulation='lagged' is about several micro-batches: use micro_batches above 1, or 'exact'",
  ),
  'buffer': (
    BalanceConfig(SPREAD, accumulation='buffer'),
    TOP_K,
    1,
    "balance.accumulation='buffer' is about several micro-batches: use micro_batches above 1, or 'exact'",
  ),
}


@pytest.mark.parametrize('name', MISFITS)
def test_what_a_router_cannot_serve_is_told_with_its_remedy(name: str) -> None:
  balance, of, micro_batches, told = MISFITS[name]
  problems = [problem for problem in router_problems(balance, of, micro_batches) if problem]
  assert len(problems) == 1 and problems[0].startswith(told), problems


def test_what_fits_is_not_complained_about() -> None:
  for fits in (
    (BalanceConfig(bias_rule='sign'), GROUPED, 1),
    (BalanceConfig(bias_rule='quantile'), GROUPED, 1),
    (BalanceConfig(frozendict(load='0.1')), NOISY, 1),
    (BalanceConfig(partition=4), TOP_K, 1),
    (BalanceConfig(SPREAD, accumulation='lagged'), TOP_K, 2),
    (BalanceConfig(SPREAD), HASH, 1),
    (
      BalanceConfig(frozendict(importance='1', gshard='1'), assignment='first'),
      RouterConfig(8, 1, renormalise=False),
      1,
    ),
    (BalanceConfig(frozendict(importance='1')), RouterConfig(8, 1, selection='expert_choice'), 1),
  ):
    assert not any(router_problems(*fits)), fits
  assert len({text for text in map(str, router_problems(BalanceConfig(), TOP_K, 1)) if text}) == 0


def test_scopes_are_of_the_active_losses() -> None:
  losses = frozendict(
    {'ep_group': '0.1', 'micro_batch': 0.01, 'sequence': '0', 'router_z': 0.0, 'gshard': '0, 1@50%'}
  )
  cfg = BalanceConfig(
    losses, ep_groups=2, partition=4, assignment='dispatched', probability='sigmoid'
  )
  scopes = cfg.scopes(batch_size=8, micro_batches=4)
  assert scopes == {
    name: Scope(rows, 4, 'dispatched', 'sigmoid')
    for name, rows in (('ep_group', 4), ('micro_batch', 2), ('gshard', 2))
  }
  assert spans_micro_batches(scopes, 2) == ('ep_group',) and hash(cfg) == hash(
    BalanceConfig(losses, '', '0.001', 2, 4, 'dispatched', 'sigmoid')
  )
  buffered = BalanceConfig(losses, ep_groups=2, accumulation='buffer').scopes(8, 4)
  assert buffered['ep_group'] == Scope(4, running=True)
