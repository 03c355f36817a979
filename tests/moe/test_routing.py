"""Routing against the oracle: scores, probabilities, choice, weights, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.moe.routing import SCORE_FNS, RouterConfig, Routing, route, router_logits
from moejax.moe.selection import whole_rows
from tests.moe.slopes import check_slopes
from tests.support import oracle
from tests.support.quick import QUICK

# Experts, top-k, groups and how many of them.
SHAPES = [(4, 1, (1, 1)), (8, 2, (1, 1)), (8, 2, (4, 2))]


routed = jax.jit(route, static_argnames='cfg', compiler_options=QUICK)


def cases(num_experts: int) -> np.ndarray:
  """Two rows of logits a case, [16, 3, E].

  Plain, steep, ties, equal, ±1e4, one far ahead, all very low.
  """
  rng = np.random.default_rng(num_experts)
  shape = (2, 3, num_experts)
  plain = rng.normal(size=shape)
  ahead = plain.copy()
  ahead[..., 1] = 1e4
  return np.concatenate(
    [
      plain,
      5 * plain[:, ::-1],
      rng.integers(0, 2, shape),
      np.zeros(shape),
      rng.choice([-1e4, 0.0, 1e4], shape),
      ahead,
      plain - 50,
      np.full(shape, -1e4),
    ]
  ).astype(np.float32)


@functools.partial(jax.jit, static_argnames='cfg', compiler_options=QUICK)
def route_and_gradients(
  logits: Array, bias: Array, to_weights: Array, to_probs: Array, cfg: RouterConfig
) -> tuple[Routing, Array, Array]:
  """The routing, and gradients of weights · to_weights and probs · to_probs to (logits, bias)."""
  routing, pull = jax.vjp(lambda z, b: route(z, b, cfg), logits, bias)
  nothing = jax.tree.map(
    lambda x: jnp.zeros_like(x) if x.dtype == jnp.float32 else np.zeros(x.shape, jax.dtypes.float0),
    routing,
  )
  return routing, pull(nothing._replace(weights=to_weights)), pull(nothing._replace(probs=to_probs))


def biases(num_experts: int) -> list[np.ndarray]:
  """No bias; one that decides; one that is negative everywhere.

  With the last, 0 outside the kept groups would win.
  """
  rng = np.random.default_rng(7)
  some = rng.normal(size=num_experts).astype(np.float32)
  return [np.zeros(num_experts, np.float32), some, some - 5]


@pytest.mark.parametrize(('num_experts', 'top_k', 'groups'), SHAPES)
@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_routing_and_gradients_are_the_oracles(
  score_fn: str, num_experts: int, top_k: int, groups: tuple[int, int]
) -> None:
  renormalise, scale = groups[0] > 1 or num_experts > 4, 2.5 if groups[0] > 1 else 1.0
  cfg = RouterConfig(num_experts, top_k, score_fn, *groups, renormalise, scale)
  logits = cases(num_experts)
  rng = np.random.default_rng(1)
  to_weights = rng.normal(size=(*logits.shape[:2], top_k)).astype(np.float32)
  to_probs = rng.normal(size=logits.shape).astype(np.float32)
  for bias in biases(num_experts):
    got, from_weights, from_probs = route_and_gradients(logits, bias, to_weights, to_probs, cfg)
    want = oracle.route(
      logits,
      bias,
      top_k=top_k,
      score_fn=score_fn,
      num_groups=groups[0],
      top_groups=groups[1],
      renormalise=renormalise,
      scale=scale,
    )
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_array_equal(got.logits, logits)
    np.testing.assert_allclose(got.scores, want.scores, rtol=3e-6, atol=1e-37)
    np.testing.assert_allclose(
      got.probs, oracle.probabilities(logits, score_fn), rtol=3e-6, atol=1e-37
    )
    check_slopes(from_probs[0], lambda z: oracle.probabilities(z, score_fn) * to_probs, logits)
    # Where all chosen scores underflow, weights are 0 / 0: what guards that must leave all finite.
    known = np.take_along_axis(want.scores, want.expert_ids, -1).sum(-1) > 1e-12
    ids, to = want.expert_ids[known], to_weights[known]
    np.testing.assert_allclose(got.weights[known], want.weights[known], rtol=3e-6, atol=1e-37)
    assert np.isfinite(got.weights).all() and np.isfinite(from_weights[0]).all()
    check_slopes(
      from_weights[0][known],
      lambda z, ids=ids, to=to: oracle.weigh(z, ids, score_fn, renormalise, scale) * to,
      logits[known],
    )
    assert not np.any(from_weights[1]) and not np.any(from_probs[1]), (
      'the bias chooses; it has no gradient'
    )


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_probabilities_sum_to_one_however_extreme_the_logits(score_fn: str) -> None:
  probs = routed(cases(8), jnp.zeros(8), RouterConfig(8, 2, score_fn)).probs
  np.testing.assert_allclose(np.asarray(probs, np.float64).sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_bias_moves_the_choice_and_nothing_else(score_fn: str) -> None:
  logits = cases(8)
  cfg = RouterConfig(8, 2, score_fn, renormalise=False)
  plain, biased = (routed(logits, jnp.zeros(8).at[5].set(b), cfg) for b in (0.0, 300.0))
  assert (np.asarray(biased.expert_ids)[..., 0] == 5).all()
  np.testing.assert_array_equal(plain.scores, biased.scores)
  np.testing.assert_array_equal(plain.probs, biased.probs)
  np.testing.assert_array_equal(
    biased.weights, np.take_along_axis(np.asarray(plain.scores), biased.expert_ids, -1)
  )
  # The same for all experts: nothing changes, not even the order.
  shifted = routed(cases(8)[:4], jnp.full(8, -2.0), cfg)
  np.testing.assert_array_equal(shifted.expert_ids, plain.expert_ids[:4])


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_renaming_experts_renames_the_choice(score_fn: str) -> None:
  logits, bias = cases(8)[:4], biases(8)[1]
  old_name = np.random.default_rng(3).permutation(8)  # of each new one
  cfg = RouterConfig(8, 2, score_fn)
  one, two = routed(logits, bias, cfg), routed(logits[..., old_name], bias[old_name], cfg)
  np.testing.assert_array_equal(one.expert_ids, old_name[np.asarray(two.expert_ids)])
  np.testing.assert_allclose(one.weights, two.weights, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(one.probs)[..., old_name], two.probs, rtol=1e-6)


def test_ties_go_to_the_lowest_index_of_experts_and_of_groups() -> None:
  flat = routed(jnp.zeros((1, 1, 8)), jnp.zeros(8), RouterConfig(8, 3))
  np.testing.assert_array_equal(flat.expert_ids[0, 0], [0, 1, 2])
  bias = jnp.zeros(8).at[:2].set(-1.0)
  grouped = routed(jnp.zeros((1, 1, 8)), bias, RouterConfig(8, 3, num_groups=4, top_groups=2))
  np.testing.assert_array_equal(grouped.expert_ids[0, 0], [2, 3, 4])


def test_a_group_is_worth_its_two_best_and_the_rest_is_out_of_reach() -> None:
  # The first group would win by its best alone, and by the sum of all its three.
  scores = jnp.asarray([[[0.20, 0.05, 0.05, 0.16, 0.12, 0.01]]])
  logits = jnp.log(scores / (1 - scores))
  cfg = RouterConfig(6, 3, 'sigmoid', num_groups=2, top_groups=1)
  # Every choice is negative: an entry of 0 outside the group would win over all of it.
  for bias in (0.0, -1.0):
    np.testing.assert_array_equal(
      routed(logits, jnp.full(6, bias), cfg).expert_ids[0, 0], [3, 4, 5]
    )


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_token_choice_is_causal(score_fn: str) -> None:
  logits, bias = cases(8), biases(8)[1]
  cfg = RouterConfig(8, 2, score_fn, num_groups=4, top_groups=2)
  changed = np.concatenate([logits[:, :2], -logits[:, 2:]], 1)
  before, after = routed(logits, bias, cfg), routed(changed, bias, cfg)
  assert not np.array_equal(before.expert_ids, after.expert_ids)
  for one, two in zip(before, after, strict=True):
    np.testing.assert_array_equal(one[:, :2], two[:, :2])


def test_router_is_float32_whatever_the_activations_are() -> None:
  rng = np.random.default_rng(5)
  x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
  logits = router_logits(x, w)
  assert logits.dtype == jnp.float32
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
  routing = routed(logits, jnp.zeros(4), RouterConfig(4, 2, 'sigmoid'))
  assert {leaf.dtype for leaf in jax.tree.leaves(routing)} == {
    jnp.dtype('float32'),
    jnp.dtype('int32'),
  }
  # A bias of 1e-3 decides between equals of about 0.7, where bfloat16 steps by 4e-3.
  near = routed(
    jnp.full((1, 1, 4), 0.85), jnp.zeros(4).at[3].set(1e-3), RouterConfig(4, 1, 'sigmoid')
  )
  assert int(near.expert_ids[0, 0, 0]) == 3


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ({'logits': np.zeros((1, 2, 4), np.float32)}, 'float32[1, 2, 4]: use float32 [B, S, 8]'),
    ({'logits': np.zeros((2, 8), np.float32)}, 'float32[2, 8]: use float32 [B, S, 8]'),
    ({'logits': jnp.zeros((1, 2, 8), jnp.bfloat16)}, 'bfloat16[1, 2, 8]: use float32 [B, S, 8]'),
    ({'bias': np.zeros(1, np.float32)}, 'bias is float32[1]: use float32 [8]'),
    ({'bias': jnp.zeros(8, jnp.bfloat16)}, 'bias is bfloat16[8]: use float32 [8]'),
    ({'tokens': whole_rows(np.ones((2, 2), bool))}, 'tokens.mask is [2, 2]: use [1, 2]'),
    ({'cfg': RouterConfig(8, 2, noisy=True)}, 'noise_std is None, and the router is noisy'),
    ({'cfg': RouterConfig(8, 2, selection='hash')}, 'tokens.ids is None: use tokens=Tokens('),
  ],
)
def test_what_a_router_would_compute_otherwise_is_refused(
  arguments: dict[str, object], told: str
) -> None:
  fits = {'logits': np.zeros((1, 2, 8), np.float32), 'bias': None, 'cfg': RouterConfig(8, 2)}
  with pytest.raises(ValueError) as error:
    route(**fits | arguments)
  assert told in str(error.value)


def test_no_bias_is_a_bias_of_zeros() -> None:
  logits = np.random.default_rng(3).normal(size=(1, 4, 8)).astype(np.float32)
  one, other = (route(logits, bias, RouterConfig(8, 2)) for bias in (None, np.zeros(8)))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_group_is_worth_as_many_of_its_best_as_asked() -> None:
  rng = np.random.default_rng(9)
  logits = rng.normal(size=(4, 16, 12)).astype(np.float32)
  bias = rng.normal(size=12).astype(np.float32)
  counts = (1, 2, 3, 9)  # 9: more than a group has, all of it
  cfgs = [RouterConfig(12, 2, 'sigmoid', num_groups=3, top_groups=1, group_best=n) for n in counts]
  all_chosen = jax.jit(
    lambda z, b: [route(z, b, cfg).expert_ids for cfg in cfgs], compiler_options=QUICK
  )
  chosen = dict(zip(counts, map(np.asarray, all_chosen(logits, bias)), strict=True))
  choice = oracle.scores(logits, 'sigmoid') + bias
  for group_best, ids in chosen.items():
    for t in np.ndindex(4, 16):
      limited = oracle.limited_to_groups(choice[t], 3, 1, group_best)
      np.testing.assert_array_equal(ids[t], oracle.best(limited, 2))
  assert len({ids.tobytes() for ids in chosen.values()}) == 4


def test_the_rest_at_minus_infinity_is_the_choice_of_deepseek_v2s_zeros() -> None:
  """Softmax scores are above 0 and have no bias.

  So 0 outside the groups loses to everything inside.
  """
  groups, size, kept, top_k = 4, 3, 2, 6  # as many as there are inside
  limited = 0
  rng = np.random.default_rng(4)
  logits = rng.normal(scale=3, size=(2, 50, groups * size)).astype(np.float32)
  cfg = RouterConfig(
    groups * size, top_k, 'softmax', groups, kept, renormalise=False, scale=16, group_best=1
  )
  got = routed(logits, np.zeros(groups * size, np.float32), cfg)
  for t in np.ndindex(logits.shape[:2]):
    s = oracle.softmax(logits[t].astype(np.float64))
    inside = oracle.best([s[g * size : (g + 1) * size].max() for g in range(groups)], kept)
    zeros = np.array([s[e] if e // size in inside else 0.0 for e in range(len(s))])
    chosen = oracle.best(zeros, top_k)
    np.testing.assert_array_equal(got.expert_ids[t], chosen)
    np.testing.assert_allclose(got.weights[t], 16 * s[chosen], rtol=1e-5)
    limited += set(oracle.best(s, top_k)) != set(chosen)
  assert limited > 80, 'nearly every token would go elsewhere without groups'


def test_sqrt_softplus_is_exact_where_it_is_tiny_and_where_it_is_large() -> None:
  z = np.concatenate([np.linspace(-120, 40, 641), [-1e4, -15, 0, 1e4, 3e38, -3e38]]).astype(
    np.float32
  )
  value_and_slope = jax.vmap(jax.value_and_grad(SCORE_FNS['sqrt_softplus']))
  log_scores, slopes = jax.jit(value_and_slope, compiler_options=QUICK)(z)
  np.testing.assert_allclose(
    log_scores, oracle.log_sqrt_softplus(z.astype(np.float64)), rtol=1e-6, atol=2e-7
  )
  for x, slope in zip(z.astype(np.float64), np.asarray(slopes), strict=True):
    # d/dz log softplus(z) / 2 = sigmoid(z) / (2 softplus(z))
    softplus = max(x, 0) + np.log1p(np.exp(-abs(x)))
    want = 0.5 if x < -30 else 1 / (1 + np.exp(-x)) / (2 * softplus)
    np.testing.assert_allclose(slope, want, rtol=2e-6, atol=1e-38)
