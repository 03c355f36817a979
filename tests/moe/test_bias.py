"""Bias rules against the oracle, and what every rule must do whatever its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.bias import BIAS_RULES, BiasState, counts, init_bias_state
from moejax.moe.routing import SCORE_FNS, RouterConfig, route
from tests.moe.bias_cases import MASK, E, K, batches, some_state
from tests.support import oracle
from tests.support.quick import QUICK

RULES = sorted(BIAS_RULES)


COUNTING = sorted(rule for rule in BIAS_RULES if BIAS_RULES[rule].observe is counts)


rules = pytest.mark.parametrize('rule', RULES)


counting = pytest.mark.parametrize('rule', COUNTING)


LOAD = np.array([9, 5, 1, 6, 4, 5, 0, 12], np.int32)


@functools.partial(jax.jit, static_argnames='names', compiler_options=QUICK)
def push(
  state: BiasState, loads: jax.Array, rate: jax.Array, names: tuple[str, ...] = (*COUNTING,)
) -> dict[str, BiasState]:
  """Rule -> the states [n, E] that loads [n, E], or histograms [n, E, BINS], make of one state."""
  return {
    rule: jax.vmap(BIAS_RULES[rule].update, (None, 0, None, None))(state, loads, rate, K)
    for rule in names
  }


@functools.partial(jax.jit, static_argnames='cfg', compiler_options=QUICK)
def steps(
  state: BiasState, logits: jax.Array, mask: jax.Array, rate: jax.Array, cfg: RouterConfig
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, BiasState]]:
  """For n batches, logits [n, B, S, E]: what is routed, seen and done.

  Scores, expert_ids, what each rule sees, and the state that it makes of it.
  """
  routing = jax.vmap(lambda z: route(z, state.bias, cfg))(logits)
  seen = {
    name: jax.vmap(rule.observe, (0, None, 0))(routing, state.bias, mask)
    for name, rule in BIAS_RULES.items()
  }
  new = {
    name: jax.vmap(rule.update, (None, 0, None, None))(state, seen[name], rate, cfg.top_k)
    for name, rule in BIAS_RULES.items()
  }
  return routing.scores, routing.expert_ids, seen, new


@pytest.mark.parametrize('num_experts', [4, 8, 60])
@counting
def test_update_is_the_oracles(rule: str, num_experts: int) -> None:
  rng = np.random.default_rng(0)
  state = some_state(num_experts)
  loads = np.stack(
    [
      *rng.integers(0, 50, (8, num_experts)),
      np.eye(num_experts)[1] * 37,
      np.eye(num_experts)[2],
      np.r_[0, rng.integers(1, 50, num_experts - 1)],
      np.full(num_experts, 12),
      rng.integers(10**4, 10**5, num_experts),
    ]
  )
  for rate in (1e-3, 0.5):
    got = push(state, loads.astype(np.int32), rate)[rule]
    for i, load in enumerate(loads):
      want = oracle.COUNT_RULES[rule](
        oracle.BiasState(*map(np.float64, state)), load.astype(np.float64), rate
      )
      np.testing.assert_allclose(got.bias[i], want.bias, rtol=1e-6, atol=1e-7, err_msg=f'{load}')
      np.testing.assert_allclose(
        got.momentum[i], want.momentum, rtol=1e-6, atol=1e-7, err_msg=f'{load}'
      )
  assert got.bias.dtype == got.momentum.dtype == jnp.float32 and got.bias.shape == loads.shape


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_what_is_observed_and_done_is_the_oracles(score_fn: str) -> None:
  """From logits to the new state, every rule, on batches with masks, ties and extremes.

  All of it stays finite.
  """
  state, rate = some_state(E), 0.01
  logits, masks = (np.stack(a) for a in zip(*batches().values(), strict=True))
  scores, expert_ids, _, got = steps(state, logits, masks, rate, RouterConfig(E, K, score_fn))
  for i, (label, (_, mask)) in enumerate(batches().items()):
    seen = oracle.Seen(scores[i], expert_ids[i], mask)
    for rule in RULES:
      want = oracle.bias_step(rule, state, seen, rate)
      for new, wanted in zip(got[rule], want, strict=True):
        np.testing.assert_allclose(new[i], wanted, rtol=1e-6, atol=1e-7, err_msg=f'{rule} {label}')


@rules
def test_nothing_to_do_holds_every_bit(rule: str) -> None:
  """At a rate of 0, and where no token counts: bias and momentum stay."""
  state = some_state(E)
  logits, masks = (np.stack(a) for a in zip(*batches().values(), strict=True))
  *_, at_zero = steps(state, logits, masks, 0.0, RouterConfig(E, K))
  *_, unseen = steps(state, logits, np.zeros_like(masks), 0.5, RouterConfig(E, K))
  *_, moved = steps(state, logits, masks, 0.5, RouterConfig(E, K))
  for held in (at_zero, unseen):
    for old, new in zip(state, held[rule], strict=True):
      np.testing.assert_array_equal(new, np.broadcast_to(old, new.shape))
  assert (moved[rule].bias[0] != state.bias).any()


@pytest.mark.parametrize('num_experts', [3, 7, 12, 60, 160])
def test_even_load_does_not_push(num_experts: int) -> None:
  """To the bit, and also where E is no power of two.

  A mean that is off by a rounding is a whole step of the sign rules.
  """
  state = some_state(num_experts)._replace(momentum=np.zeros(num_experts, np.float32))
  loads = np.outer([1, 7, 11, 4099, 2**26, 2**26 + 1, 2**31 - 1], np.ones(num_experts, np.int32))
  loads = loads.astype(np.int32)
  for rule, new in push(state, loads, 1e-3).items():
    np.testing.assert_array_equal(new.bias, np.broadcast_to(state.bias, loads.shape), err_msg=rule)
    assert not np.any(new.momentum)


def test_momentum_of_smebu_decays_and_still_moves() -> None:
  state = some_state(E)
  new = push(state, np.full((1, E), 12, np.int32), 1e-3)['smebu']
  np.testing.assert_allclose(new.momentum[0], state.momentum / 2, rtol=1e-6)
  np.testing.assert_allclose(new.bias[0], state.bias + state.momentum / 2, rtol=1e-6)


def test_under_a_steady_load_smebu_moves_by_the_rate() -> None:
  """The weights of its average sum to 1.

  A crowd that stays the same moves the bias as fast as without momentum.
  """
  state = init_bias_state(E)
  for _ in range(30):
    before, state = state, BiasState(*(a[0] for a in push(state, LOAD[None], 0.01)['smebu']))
  push_of = np.tanh(2 * (1 - LOAD / LOAD.mean()))
  np.testing.assert_allclose(state.bias - before.bias, 0.01 * (push_of - push_of.mean()), rtol=1e-4)


def test_a_state_is_two_arrays_that_can_be_donated() -> None:
  state = init_bias_state(6)
  assert state.bias.unsafe_buffer_pointer() != state.momentum.unsafe_buffer_pointer()


def test_begins_at_zero_in_float32() -> None:
  state = init_bias_state(6)
  assert all(a.shape == (6,) and a.dtype == jnp.float32 and not a.any() for a in state)


@counting
def test_crowded_experts_go_down_and_empty_ones_up(rule: str) -> None:
  """Seen from the expert that has the mean load."""
  load = np.array([9, 5, 1, 6, 4, 10, 0], np.float32)
  moved = np.asarray(
    push(init_bias_state(7), load * np.array([[1], [11], [4099]], np.float32), 1.0)[rule].bias
  )
  for step in moved:
    relative = step - step[1]
    np.testing.assert_array_equal(
      np.where(np.abs(relative) < 1e-6, 0, np.sign(relative)), np.sign(5 - load)
    )


@pytest.mark.parametrize('rule', ['centred_sign', 'quantile', 'smebu'])
def test_centred_rules_keep_the_mean(rule: str) -> None:
  state = init_bias_state(E)
  *_, got = steps(state, batches()['padded'][0][None], MASK[None], 0.5, RouterConfig(E, K))
  assert np.abs(got[rule].bias).max() > 0.01 and abs(got[rule].bias.mean()) < 1e-7


@rules
def test_renaming_experts_renames_the_bias(rule: str) -> None:
  state, cfg = some_state(E), RouterConfig(E, K)
  logits, mask = batches()['padded']
  old_name = np.random.default_rng(3).permutation(E)
  *_, want = steps(state, logits[None], mask[None], 0.01, cfg)
  *_, got = steps(
    BiasState(*(a[old_name] for a in state)), logits[None, ..., old_name], mask[None], 0.01, cfg
  )
  for a, b in zip(got[rule], want[rule], strict=True):
    np.testing.assert_allclose(a, b[:, old_name], rtol=1e-6, atol=1e-8)


@rules
def test_a_larger_batch_of_the_same_shares_is_the_same_step(rule: str) -> None:
  state = some_state(E)
  logits, mask = batches()['padded']
  seen = steps(state, logits[None], mask[None], 0.01, RouterConfig(E, K))[2][rule]
  once, often = (push(state, seen * n, 0.01, (rule,))[rule] for n in (1, 64))
  np.testing.assert_allclose(often.bias, once.bias, rtol=1e-6)
  assert (once.bias != state.bias).any()


@rules
def test_layers_do_not_see_each_other(rule: str) -> None:
  """A rule is vmapped over layers [L, E]: each is as if alone."""
  logits = np.stack([batches()['padded'][0], batches()['one crowd'][0]])
  states = [some_state(E, 0), some_state(E, 1)]
  seen = [
    steps(state, z[None], MASK[None], 0.01, RouterConfig(E, K))[2][rule][0]
    for state, z in zip(states, logits, strict=True)
  ]
  both = jax.vmap(BIAS_RULES[rule].update, (0, 0, None, None))(
    BiasState(*map(np.stack, zip(*states, strict=True))), np.stack(seen), 0.01, K
  )
  for layer in range(2):
    alone = push(states[layer], seen[layer][None], 0.01, (rule,))[rule]
    np.testing.assert_allclose(both.bias[layer], alone.bias[0], rtol=1e-6)


@counting
def test_counts_of_the_whole_batch_are_not_the_mean_of_what_shards_would_do(rule: str) -> None:
  """One step from global counts is the rule; the mean of what uneven shards would do is another."""
  shards = np.array([[8, 0, 0, 0], [1, 3, 2, 2], [0, 4, 3, 9]], np.float32)
  new = np.asarray(push(init_bias_state(4), np.stack([shards.sum(0), *shards]), 1.0)[rule].bias)
  start = oracle.BiasState(np.zeros(4), np.zeros(4))
  np.testing.assert_allclose(
    new[0], oracle.COUNT_RULES[rule](start, np.float64(shards.sum(0)), 1.0).bias, rtol=1e-6
  )
  assert np.abs(new[0] - new[1:].mean(0)).max() > 0.1


@functools.cache
def closed_loop(score_fn: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Rule -> bias and loads of each step, for a fixed crowd that prefers some experts."""
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(4, 64, E)) + np.linspace(-1, 1, E)).astype(np.float32)
  mask, cfg = np.ones((4, 64), bool), RouterConfig(E, K, score_fn)

  def step(
    states: dict[str, BiasState], rate: jax.Array
  ) -> tuple[dict[str, BiasState], dict[str, jax.Array]]:
    routings = {name: route(logits, state.bias, cfg) for name, state in states.items()}
    loads = {name: counts(routing, states[name].bias, mask) for name, routing in routings.items()}
    return {
      name: BIAS_RULES[name].update(
        state, BIAS_RULES[name].observe(routings[name], state.bias, mask), rate, K
      )
      for name, state in states.items()
    }, loads

  rates = 0.01 * np.linspace(1, 0, 200, dtype=np.float32)
  states, loads = jax.jit(
    lambda: jax.lax.scan(step, {name: init_bias_state(E) for name in RULES}, rates)
  )()
  return {name: np.asarray(state.bias) for name, state in states.items()}, jax.device_get(loads)


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
@rules
def test_closes_the_loop_with_the_router(rule: str, score_fn: str) -> None:
  """The bias alone spreads the crowd."""
  bias, loads = (a[rule] for a in closed_loop(score_fn))
  assert oracle.max_vio(loads[0]) > 0.8
  assert oracle.max_vio(loads[-1]) < 0.15, loads[-1]
  assert np.isfinite(bias).all()


@pytest.mark.parametrize('score_fn', sorted(SCORE_FNS))
def test_the_quantile_rule_is_there_in_ten_steps(score_fn: str) -> None:
  """And stays, at rates from 0.01 to almost 0: it has none."""
  assert max(oracle.max_vio(load) for load in closed_loop(score_fn)[1]['quantile'][10:]) < 0.05
  others = [closed_loop(score_fn)[1][name][10] for name in COUNTING]
  assert min(oracle.max_vio(load) for load in others) > 0.2
