"""Balance losses against the oracle, values and gradients, and what must leave them as they are."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import Array

from moejax.config import ConfigError, frozendict
from moejax.moe.balance import (
  ASSIGNMENTS,
  BALANCE_LOSSES,
  BalanceConfig,
  Scope,
  counted_ids,
  load,
  shares,
  spans_micro_batches,
)
from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route

QUICK = {'xla_backend_optimization_level': 0}   # programs run once or twice: compiling is all the time
B, S, MICRO_BATCHES, EP_GROUPS = 4, 8, 2, 4
ROWS = list(itertools.product(sorted(BALANCE_LOSSES), ASSIGNMENTS))   # what `measure` measures, in its order
# Two groups of which one is kept, so that what is dispatched is not what the scores alone would choose.
ROUTERS = [RouterConfig(e, k, score_fn, num_groups=2, top_groups=1)
           for e, k, score_fn in itertools.product((4, 8), (1, 2), sorted(SCORE_FNS))]
LARGEST = [cfg for cfg in ROUTERS if (cfg.num_experts, cfg.top_k) == (8, 2)]


BALANCED = [i for i, (name, _) in enumerate(ROWS) if name != 'router_z']

routers = functools.partial(pytest.mark.parametrize, 'cfg',
                            ids=lambda cfg: f'{cfg.score_fn}-{cfg.num_experts}-{cfg.top_k}')

routed = jax.jit(route, static_argnames='cfg', compiler_options=QUICK)


class Case(NamedTuple):
  logits: np.ndarray    # [B, S, E] f32
  bias: np.ndarray      # [E] f32
  mask: np.ndarray      # [B, S] bool
  segments: np.ndarray  # [B, S] i32


WHOLE = np.ones((B, S), np.int32)
PADDED = (np.arange(S) < np.array([[8], [5], [1], [3]])).astype(np.int32)
PACKED = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 2, 3, 3, 3, 4, 4], [1] * 8, [1] * 4 + [2] * 4], np.int32)
MIXED = np.where(np.arange(S) < np.array([[8], [6], [0], [7]]), PACKED, 0)


@functools.cache
def cases(num_experts: int) -> dict[str, Case]:
  """Batches by what is unusual about them."""
  rng = np.random.default_rng(num_experts)
  shape = (B, S, num_experts)
  bias = rng.normal(scale=0.3, size=num_experts).astype(np.float32)
  plain = rng.normal(size=shape).astype(np.float32)
  ahead, avoided = plain.copy(), plain.copy()
  ahead[..., 1], avoided[..., 0] = 50, -20
  holes = (MIXED > 0) & (rng.random((B, S)) < 0.8)      # also tokens inside a document that do not count
  holes[0, 3:7] = False                                 # and a document of which no token does
  single = np.zeros((B, S), bool)
  single[1, 2] = True
  return {
    'plain': Case(plain, np.zeros_like(bias), WHOLE > 0, WHOLE),
    'padded': Case(2 * plain, bias, PADDED > 0, PADDED),
    'packed': Case(plain, bias, PACKED > 0, PACKED),
    'holes': Case(plain, bias, holes, MIXED),
    'ties': Case(rng.integers(0, 2, shape).astype(np.float32), np.zeros_like(bias), MIXED > 0, MIXED),
    'equal': Case(np.zeros(shape, np.float32), bias, MIXED > 0, MIXED),
    'extreme': Case(rng.choice([-1e4, 0, 1e4], shape).astype(np.float32), bias, MIXED > 0, MIXED),
    'all to one': Case(ahead, bias, MIXED > 0, MIXED),
    'one unchosen': Case(avoided, np.zeros_like(bias), MIXED > 0, MIXED),
    'low': Case(plain - 50, np.zeros_like(bias), MIXED > 0, MIXED),
    'single': Case(plain, bias, single, PACKED),
    'nothing': Case(plain, bias, np.zeros((B, S), bool), PADDED),
  }


def scope_of(name: str, assignment: str, micro_batches: int = MICRO_BATCHES,
             ep_groups: int = EP_GROUPS) -> Scope:
  return Scope(BALANCE_LOSSES[name].rows(B, micro_batches, ep_groups), assignment)


@functools.partial(jax.jit, static_argnames='cfg', compiler_options=QUICK)
def measure(logits: Array, bias: Array, mask: Array, segments: Array,
            cfg: RouterConfig) -> tuple[Array, Array, Array, Routing]:
  """Every loss with every assignment: values [n], gradients to logits [n, B, S, E] and to the bias [n, E]."""
  def losses(logits: Array, bias: Array) -> tuple[Array, Routing]:
    routing = route(logits, bias, cfg)
    return jnp.stack([BALANCE_LOSSES[name].value(routing, mask, segments, scope_of(name, assignment))
                      for name, assignment in ROWS]), routing
  values, pull, routing = jax.vjp(losses, logits, bias, has_aux=True)
  return values, *jax.vmap(pull)(jnp.eye(len(ROWS))), routing


@functools.cache
def measured(cfg: RouterConfig, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routing]:
  return jax.tree.map(np.asarray, measure(*cases(cfg.num_experts)[case], cfg))


def wanted(name: str, assignment: str, case: Case, cfg: RouterConfig,
           expert_ids: np.ndarray) -> tuple[float, float, np.ndarray]:
  """The oracle's value, and its slope along a random direction; f has no gradient: the choice is fixed."""
  ids = oracle.assignment_of(case.logits, expert_ids, cfg.score_fn, assignment)

  def f(z: np.ndarray) -> float:
    return oracle.loss(name, z, ids, case.mask, case.segments, score_fn=cfg.score_fn,
                       assignment='dispatched', micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS)

  direction = np.random.default_rng(1).normal(size=case.logits.shape)
  return f(case.logits), oracle.slope(f, case.logits, direction), direction


@pytest.mark.parametrize('name', sorted(BALANCE_LOSSES))
@routers(ROUTERS)
def test_value_and_gradient_are_the_oracles(cfg: RouterConfig, name: str) -> None:
  for label, case in cases(cfg.num_experts).items():
    values, gradients, to_bias, routing = measured(cfg, label)
    ids = oracle.route(case.logits, case.bias, top_k=cfg.top_k, score_fn=cfg.score_fn, num_groups=2,
                       top_groups=1).expert_ids
    np.testing.assert_array_equal(routing.expert_ids, ids)
    for assignment in ASSIGNMENTS:
      row = ROWS.index((name, assignment))
      value, slope, direction = wanted(name, assignment, case, cfg, ids)
      np.testing.assert_allclose(values[row], value, rtol=1e-6, err_msg=f'{label} {assignment}')
      gradient = gradients[row].astype(np.float64)
      np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5,
                                 atol=1e-5 * np.linalg.norm(gradient) + 3e-8, err_msg=f'{label} {assignment}')
      assert not gradient[~case.mask].any(), 'a token that does not count has a gradient'
      assert not to_bias[row].any(), 'the bias has a gradient'


@pytest.mark.parametrize('name', sorted(BALANCE_LOSSES))
@routers([cfg for cfg in ROUTERS if (cfg.num_experts, cfg.top_k) == (4, 2)])
def test_every_entry_of_the_gradient_is_the_finite_difference(cfg: RouterConfig, name: str) -> None:
  case = cases(4)['holes']
  _, gradients, _, routing = measured(cfg, 'holes')
  want = oracle.finite_difference(
    lambda z: oracle.loss(name, z, routing.expert_ids, case.mask, case.segments, score_fn=cfg.score_fn,
                          assignment='dispatched', micro_batches=MICRO_BATCHES, ep_groups=EP_GROUPS),
    case.logits)
  got = gradients[ROWS.index((name, 'dispatched'))]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


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
  routing = routed(logits, no_bias, cfg)
  chosen = np.asarray(jax.nn.one_hot(routing.expert_ids, 8).sum(2)) > 0
  value, gradient = jax.jit(jax.value_and_grad(
    lambda z: BALANCE_LOSSES['global_batch'].value(route(z, no_bias, cfg), mask, segments)))(logits)
  old_value, old = jax.jit(jax.value_and_grad(old_maxtext_loss), static_argnums=2)(logits, mask, cfg)
  gradient, old = np.asarray(gradient), np.asarray(old)
  assert (gradient != 0).all()
  assert (np.abs(old[~chosen]) < 1e-6 * np.abs(old).max()).all(), 'the old way reached the others'
  # A third and more of what moves the router was missing, and the rest pointed elsewhere.
  assert np.linalg.norm(gradient[~chosen]) > 0.3 * np.linalg.norm(gradient)
  assert (gradient * old).sum() < 0.9 * np.linalg.norm(gradient) * np.linalg.norm(old)
  full = oracle.loss('global_batch', logits, routing.expert_ids, mask, segments, score_fn='softmax',
                     assignment='dispatched')
  np.testing.assert_allclose(value, full, rtol=1e-6)
  assert abs(old_value - full) > 1e-2


def test_founding_correction_megatron_normalised_sigmoid() -> None:
  """For sigmoid scores the sequence-wise P is the sigmoid normalised over all experts, not a softmax."""
  cfg, no_bias = RouterConfig(8, 2, 'sigmoid'), jnp.zeros(8)
  logits, _, mask, segments = cases(8)['packed']

  def new_and_old(z: Array) -> tuple[Array, Array]:
    routing = route(z, no_bias, cfg)
    wrong = routing._replace(probs=jax.nn.softmax(z))
    return tuple(BALANCE_LOSSES['sequence'].value(r, mask, segments) for r in (routing, wrong))

  values, gradients = jax.jit(lambda z: (new_and_old(z), jax.jacrev(new_and_old)(z)))(logits)
  ids = oracle.route(logits, no_bias, top_k=2, score_fn='sigmoid').expert_ids
  want = [oracle.loss('sequence', logits, ids, mask, segments, score_fn=score_fn, assignment='dispatched')
          for score_fn in ('sigmoid', 'softmax')]
  np.testing.assert_allclose(values, want, rtol=1e-6)
  assert abs(want[0] - want[1]) > 0.02
  assert np.linalg.norm(gradients[0] - gradients[1]) > 0.3 * np.linalg.norm(gradients[0])
  # By hand: one token, scores 0.8 and 0.2 of which the first is chosen: f = (2, 0), P = 0.8 / (0.8 + 0.2).
  one = route(jnp.log(jnp.asarray([[[4.0, 0.25]]])), jnp.zeros(2), RouterConfig(2, 1, 'sigmoid'))
  by_hand = BALANCE_LOSSES['sequence'].value(one, np.ones((1, 1), bool), np.ones((1, 1), np.int32))
  np.testing.assert_allclose(by_hand, 1.6, rtol=1e-6)


def balanced(cfg: RouterConfig) -> Case:
  """Every document gives every expert the same count; documents of E tokens, probabilities far from even."""
  rng = np.random.default_rng(0)
  logits = rng.normal(scale=0.3, size=(B, S, cfg.num_experts)).astype(np.float32)
  group = cfg.num_experts // 2
  for t, k in itertools.product(range(S), range(cfg.top_k)):
    # Both choices in one group of experts, because only one group is kept.
    logits[:, t, t % 2 * group + (t // 2 + k) % group] += 5 - k
  segments = np.broadcast_to(1 + np.arange(S) // cfg.num_experts, (B, S)).astype(np.int32)
  return Case(logits, np.zeros(cfg.num_experts, np.float32), np.ones((B, S), bool), segments)


@routers(ROUTERS)
def test_one_at_perfect_balance_however_small_the_scores(cfg: RouterConfig) -> None:
  case = balanced(cfg)
  for shift in (0, 3, -50, -80):
    values = np.asarray(measure(case.logits + np.float32(shift), *case[1:], cfg)[0])
    np.testing.assert_allclose(values[BALANCED], 1.0, rtol=1e-6)


@routers(LARGEST)
def test_all_tokens_to_k_experts_costs_the_most(cfg: RouterConfig) -> None:
  """E/K: all probability on the K experts that all tokens go to."""
  logits = np.full((B, S, 8), -60, np.float32)
  logits[..., :2] = 60
  values = np.asarray(measure(logits, *cases(8)['plain'][1:], cfg)[0])
  np.testing.assert_allclose(values[BALANCED], 4.0, rtol=1e-6)


@routers(LARGEST)
def test_renaming_experts_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  old_name = np.array([6, 4, 7, 5, 1, 2, 0, 3])  # of each new one; groups stay together
  renamed = measure(case.logits[..., old_name], case.bias[old_name], case.mask, case.segments, cfg)
  np.testing.assert_allclose(renamed[0], values, rtol=1e-6)
  for got, want in zip(renamed[1], gradients[..., old_name], strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@routers(LARGEST)
def test_what_does_not_count_changes_nothing(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients = measured(cfg, 'holes')[:2]
  garbage = np.random.default_rng(2).normal(scale=17, size=case.logits.shape).astype(np.float32)
  got = measure(np.where(case.mask[..., None], case.logits, garbage), *case[1:], cfg)
  np.testing.assert_array_equal(got[0], values)
  np.testing.assert_array_equal(got[1], gradients)
  # Rows cut to the tokens that are there, instead of masked.
  masked = case._replace(mask=case.mask & (np.arange(S) < 5))
  cut = Case(*(a[:, :5] if np.ndim(a) > 1 else a for a in masked))
  np.testing.assert_allclose(measure(*cut, cfg)[0], measure(*masked, cfg)[0], rtol=1e-6)


@routers(LARGEST)
def test_a_packed_row_is_the_mean_of_its_documents(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  row = ROWS.index(('sequence', 'dispatched'))
  alone = [measure(case.logits, case.bias, case.mask & (np.arange(B)[:, None] == b) & (case.segments == s),
                   case.segments, cfg)[0][row]
           for b in range(B) for s in range(1, S) if (case.mask[b] & (case.segments[b] == s)).any()]
  assert len(alone) == 7
  np.testing.assert_allclose(measured(cfg, 'holes')[0][row], np.mean(alone), rtol=1e-6)
  # One document is one row, wherever it lies and whatever lies beside it.
  unpacked = np.zeros((B, S), np.int32)
  unpacked[0, :3] = unpacked[1, :4] = unpacked[2, :1] = 1
  moved = np.zeros_like(case.logits)
  moved[0, :3], moved[1, :4], moved[2, :1] = (case.logits[0, a:b] for a, b in ((0, 3), (3, 7), (7, 8)))
  first = measure(case.logits, case.bias, (np.arange(B)[:, None] == 0) & (PACKED > 0), PACKED, cfg)[0][row]
  np.testing.assert_allclose(measure(moved, case.bias, unpacked > 0, unpacked, cfg)[0][row], first, rtol=1e-6)


@routers(LARGEST)
def test_bias_is_in_no_probability(cfg: RouterConfig) -> None:
  case = cases(8)['holes']
  values, gradients, _, routing = measured(cfg, 'holes')
  other = measure(case.logits, -case.bias, case.mask, case.segments, cfg)
  assert not np.array_equal(routing.expert_ids, other[3].expert_ids)
  unbiased = [i for i, (_, assignment) in enumerate(ROWS) if assignment == 'unbiased']
  np.testing.assert_array_equal(values[unbiased], other[0][np.array(unbiased)])
  np.testing.assert_array_equal(gradients[unbiased], other[1][np.array(unbiased)])
  dispatched = ROWS.index(('global_batch', 'dispatched'))
  assert abs(values[dispatched] - other[0][dispatched]) > 1e-3, 'f does follow what was dispatched'


def set_load(case: Case, routing: Routing, assignment: str, rows: int, micro_batch: int,
             micro_rows: int) -> Array:
  """Counts of the whole set that a micro-batch is a part of."""
  first = micro_batch * micro_rows // rows * rows
  return load(counted_ids(routing, assignment)[first:first + rows], case.mask[first:first + rows],
              routing.probs.shape[-1])


def accumulate(case: Case, cfg: RouterConfig, name: str, assignment: str,
               micro_batches: int) -> tuple[Array, Array]:
  """The batch's loss and its gradient from micro-batches one by one, put together by `shares`."""
  scope, rows = scope_of(name, assignment, micro_batches, ep_groups=2), B // micro_batches
  whole = routed(case.logits, case.bias, cfg)
  cut = [np.reshape(a, (micro_batches, rows, *a.shape[1:])) for a in (case.logits, case.mask, case.segments)]
  value, gradient = 0.0, []
  for m, part in enumerate(shares(name, cut[1], cut[2], scope)):
    spans = bool(spans_micro_batches(frozendict({name: scope}), rows))
    counts = set_load(case, whole, assignment, scope.rows, m, rows) if spans else None
    v, g = micro_batch_gradient(cut[0][m], case.bias, cut[1][m], cut[2][m], counts, name, scope.rows,
                                assignment, cfg)
    value, gradient = value + part * v, [*gradient, part * g]
  return value, jnp.concatenate(gradient)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8), compiler_options=QUICK)
def micro_batch_gradient(logits: Array, bias: Array, mask: Array, segments: Array, counts: Array | None,
                         name: str, rows: int, assignment: str, cfg: RouterConfig) -> tuple[Array, Array]:
  return jax.value_and_grad(lambda z: BALANCE_LOSSES[name].value(
    route(z, bias, cfg), mask, segments, Scope(rows, assignment, counts)))(logits)


@pytest.mark.parametrize('name', sorted(BALANCE_LOSSES))
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
  cfg = RouterConfig(4, 2, 'sigmoid', num_groups=2, top_groups=1)
  assignment = 'dispatched' if name == 'ep_group' else 'unbiased'   # one is enough, and half the compiling
  for label in ('holes', 'padded', 'nothing'):
    case = cases(4)[label]
    ids = routed(case.logits, case.bias, cfg).expert_ids
    whole, whole_gradient = accumulate(case, cfg, name, assignment, 1)
    for micro_batches in (1, 2, 4):
      value, gradient = accumulate(case, cfg, name, assignment, micro_batches)
      want = oracle.loss(name, case.logits, ids, case.mask, case.segments, score_fn='sigmoid',
                         assignment=assignment, micro_batches=micro_batches, ep_groups=2)
      np.testing.assert_allclose(value, want, rtol=1e-6)
      if name != 'micro_batch':  # which is another loss for another cut, by definition
        np.testing.assert_allclose(value, whole, rtol=1e-6)
        np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5, atol=1e-7)


def test_oracle_of_parts_is_the_oracle_of_the_whole() -> None:
  for name, (label, case) in itertools.product(('sequence', 'micro_batch', 'global_batch'), cases(4).items()):
    ids = oracle.route(case.logits, case.bias, top_k=2, score_fn='sigmoid').expert_ids
    for micro_batches in (1, 2, 4):
      kw = {'score_fn': 'sigmoid', 'assignment': 'unbiased', 'micro_batches': micro_batches}
      args = (name, case.logits, ids, case.mask, case.segments)
      np.testing.assert_allclose(oracle.accumulated_balance_loss(*args, **kw), oracle.loss(*args, **kw),
                                 rtol=1e-12, err_msg=label)


@routers(ROUTERS)
def test_load_counts_every_copy_of_every_token_that_counts(cfg: RouterConfig) -> None:
  for label, case in cases(cfg.num_experts).items():
    routing = measured(cfg, label)[3]
    got = np.asarray(load(routing.expert_ids, case.mask, cfg.num_experts))
    np.testing.assert_array_equal(got, oracle.load(routing.expert_ids, case.mask, cfg.num_experts))
    assert got.sum() == case.mask.sum() * cfg.top_k and got.dtype == np.float32


def test_config_names_every_problem_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    BalanceConfig(frozendict({'sequences': '0.1'}), bias_rule='signs', ep_groups=0, assignment='biased')
  assert len(error.value.problems) == 4
  for named in ('losses.sequences', "bias_rule='signs'", 'ep_groups=0', "assignment='biased'"):
    assert any(problem.startswith(named) for problem in error.value.problems), named


def test_scopes_are_of_the_active_losses() -> None:
  losses = frozendict({'ep_group': '0.1', 'micro_batch': 0.01, 'sequence': '0', 'router_z': 0.0})
  cfg = BalanceConfig(losses, ep_groups=2, assignment='dispatched')
  scopes = cfg.scopes(batch_size=8, micro_batches=4)
  assert scopes == {'ep_group': Scope(4, 'dispatched'), 'micro_batch': Scope(2, 'dispatched')}
  assert spans_micro_batches(scopes, 2) == ('ep_group',)
