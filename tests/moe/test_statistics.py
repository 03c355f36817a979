"""Router statistics are what their formulas say, of tokens that count, however a batch is cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.routing import RouterConfig, Routing, route
from moejax.moe.selection import Tokens
from moejax.moe.statistics import (
  NEAR_TIE,
  STATISTICS,
  Stats,
  add,
  bias_statistics,
  layer_statistics,
  observe,
  token_statistics,
)
from tests.moe.statistics_cases import B, E, K, S, loads
from tests.support import oracle
from tests.support.quick import QUICK


@functools.partial(jax.jit, compiler_options=QUICK)
def observed(routing: Routing, unbiased_ids: np.ndarray, mask: np.ndarray) -> Stats:
  return observe(routing, unbiased_ids, mask)


def routed(logits: np.ndarray, bias: np.ndarray, top_k: int = K) -> tuple[Routing, np.ndarray]:
  """A sigmoid router in NumPy, and M°; the second expert of every fifth token is unassigned."""
  scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  ids = np.argsort(-(scores + bias), axis=-1, kind='stable')[..., :top_k]
  unbiased = np.argsort(-scores, axis=-1, kind='stable')[..., :top_k]
  choice = -np.sort(-(scores + bias), axis=-1)
  margin = np.ones(logits.shape[:2])
  if top_k < logits.shape[-1]:
    margin = choice[..., top_k - 1] - choice[..., top_k]
  if top_k > 1:
    ids.reshape(-1, top_k)[::5, 1] = logits.shape[-1]
  f32 = functools.partial(np.asarray, dtype=np.float32)
  probs = scores / scores.sum(-1, keepdims=True)
  unbiased = unbiased.astype(np.int32)
  return Routing(
    logits=f32(logits),
    scores=f32(scores),
    probs=f32(probs),
    expert_ids=ids.astype(np.int32),
    best_ids=unbiased,
    weights=f32(np.ones(ids.shape)),
    margin=f32(margin),
    likely=f32(np.zeros(logits.shape)),
    router=np.zeros((0, E), np.float32),
  ), unbiased


@pytest.fixture(scope='module')
def example() -> tuple[Routing, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(B, S, E)) * rng.uniform(0.1, 4, (B, S, 1))
  bias = 0.1 * rng.normal(size=E)
  logits[1, 2] = np.log((0.6 - bias) / (0.4 + bias))  # scores that the bias makes equal
  routing, unbiased = routed(logits, bias)
  mask = rng.random((B, S)) < [[0.9], [0.9], [0.3], [0.6]]
  mask[0, 0] = mask[1, 2] = True
  for field in ('logits', 'scores', 'probs', 'margin'):  # what does not count may be anything
    getattr(routing, field)[~mask] = np.nan
  return routing, unbiased, mask


def stacked(stats: Stats) -> Stats:
  """One layer as [L, ...]."""
  return jax.tree.map(lambda a: np.asarray(a)[None], jax.device_get(stats))


def by_the_formulas(routing: Routing, unbiased: np.ndarray, mask: np.ndarray) -> dict[str, float]:
  """name -> value of one layer, in loops over tokens and experts."""
  tokens = [t for t in np.ndindex(mask.shape) if mask[t]]
  chosen = {t: [e for e in routing.expert_ids[t] if e < E] for t in tokens}
  copies = sum(len(chosen[t]) for t in tokens)
  z = {t: routing.logits[t].astype(np.float64) for t in tokens}
  s = {t: routing.scores[t].astype(np.float64) for t in tokens}
  entropy, information = oracle.router_entropies(routing.probs, mask)
  together = 0
  for e in range(E):
    together += max(
      sum(e in chosen[t] and other in chosen[t] for t in tokens) for other in range(E) if other != e
    )
  return {
    'router_entropy': entropy,
    'mutual_information': information,
    'logit_rms': math.sqrt(sum(v * v for t in tokens for v in z[t]) / (len(tokens) * E)),
    'logit_max': max(abs(v) for t in tokens for v in z[t]),
    'logsumexp': sum(oracle.logsumexp(z[t]) for t in tokens) / len(tokens),
    'margin': sum(routing.margin[t] for t in tokens) / len(tokens),
    'near_ties': sum(abs(routing.margin[t]) < NEAR_TIE for t in tokens) / len(tokens),
    'override_rate': sum(e not in unbiased[t] for t in tokens for e in chosen[t]) / copies,
    'price_of_balance': 1
    - (
      sum(s[t][e] for t in tokens for e in chosen[t])
      / sum(s[t][e] for t in tokens for e in unbiased[t])
    ),
    'coactivation': together / copies,
  }


def test_token_statistics_are_their_formulas(example: tuple) -> None:
  found, wanted = token_statistics(stacked(observed(*example))), by_the_formulas(*example)
  assert set(found) == set(wanted)
  assert wanted['override_rate'] > 0.05 and wanted['price_of_balance'] > 0.02
  assert wanted['near_ties'] > 0
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], [value], rtol=2e-6, atol=1e-7, err_msg=name)


def test_on_the_diagonal_of_pairs_is_the_load(example: tuple) -> None:
  routing, _, mask = example
  stats = observed(*example)
  load = np.bincount(routing.expert_ids[mask].reshape(-1), minlength=E + 1)[:E]
  assert (np.diag(stats.pairs) == load).all() and stats.copies == load.sum() < mask.sum() * K


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('order', [1, -1])
def test_micro_batches_add_up_to_the_batch(example: tuple, parts: int, order: int) -> None:
  """Masks are uneven, so a mean of the parts' means would be something else."""
  routing, unbiased, mask = example
  rows = [slice(i * B // parts, (i + 1) * B // parts) for i in range(parts)][::order]
  cut = [
    stacked(observed(Routing(*(a[r] for a in routing[:-1]), routing.router), unbiased[r], mask[r]))
    for r in rows
  ]
  whole = stacked(observed(*example))
  total = functools.reduce(add, cut)
  for name in Stats._fields:
    np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-6, err_msg=name)
  for name, value in token_statistics(total).items():
    np.testing.assert_allclose(
      value, token_statistics(whole)[name], rtol=1e-5, atol=1e-6, err_msg=name
    )
  mean_of_parts = np.mean([token_statistics(part)['router_entropy'] for part in cut])
  assert abs(mean_of_parts - token_statistics(whole)['router_entropy']) > 1e-3


def test_adding_in_jax_is_adding_in_numpy(example: tuple) -> None:
  stats = stacked(observed(*example))
  in_jax = jax.jit(add, compiler_options=QUICK)(stats, stats)
  in_numpy = add(stats, stats)
  assert all(isinstance(a, np.ndarray) for a in in_numpy) and in_numpy.peak == stats.peak
  jax.tree.map(np.testing.assert_array_equal, in_jax, in_numpy)
  assert all(isinstance(v, np.ndarray) for v in token_statistics(in_numpy).values())


def test_preferences_have_the_values_that_they_name() -> None:
  mask = np.ones((B, S), bool)

  def of(probs: np.ndarray, ids: np.ndarray, unbiased: np.ndarray) -> dict[str, float]:
    routing, _ = routed(np.zeros((B, S, E)), np.zeros(E))
    routing = routing._replace(
      probs=probs.astype(np.float32), scores=probs.astype(np.float32), expert_ids=ids
    )
    found = token_statistics(stacked(observed(routing, unbiased, mask)))
    return {name: float(value[0]) for name, value in found.items()}

  # Tokens go in turns to the first K experts and to the next K.
  first = np.arange(B * S).reshape(B, S, 1) % 2 * K
  company = (first + np.arange(K)).astype(np.int32)
  undecided = of(np.full((B, S, E), 1 / E), company, company)
  assert undecided['router_entropy'] == pytest.approx(math.log(E), 3e-6)
  assert undecided['override_rate'] == undecided['price_of_balance'] == 0
  assert undecided['mutual_information'] == pytest.approx(0, abs=5e-6)
  assert undecided['coactivation'] == 1 and undecided['logit_rms'] == undecided['logit_max'] == 0
  assert undecided['logsumexp'] == pytest.approx(math.log(E))
  sure = of(np.eye(E)[np.arange(B * S).reshape(B, S) % E], company, (company + 4) % E)
  assert sure['router_entropy'] == pytest.approx(0, abs=1e-6)
  assert sure['mutual_information'] == pytest.approx(math.log(E))
  even = np.full((B, S, E), 1 / E)
  alone = of(even, np.full((B, S, 1), 2, np.int32), np.full((B, S, 1), 5, np.int32))
  assert alone['coactivation'] == 0 and alone['override_rate'] == 1


def test_a_margin_is_of_the_tokens_that_have_one(example: tuple) -> None:
  """None of a token that took all experts or none, and no row of margins where none ever has."""
  routing, unbiased, mask = example
  margin = np.array(routing.margin)
  margin[0] = np.inf
  stats = stacked(observed(routing._replace(margin=margin), unbiased, mask))
  found = token_statistics(stats)
  there = margin[mask & np.isfinite(margin)]
  assert stats.compared == there.size < mask.sum()
  np.testing.assert_allclose(found['margin'], [there.mean()], rtol=1e-6)
  np.testing.assert_allclose(found['near_ties'], [(abs(there) < NEAR_TIE).mean()], rtol=1e-6)
  without = token_statistics(stats, has_margin=False)
  assert {*found} - {*without} == {'margin', 'near_ties'}
  margin[:] = np.inf
  nothing = token_statistics(stacked(observed(routing._replace(margin=margin), unbiased, mask)))
  assert nothing['margin'] == nothing['near_ties'] == 0


@pytest.mark.parametrize(
  ('cfg', 'has_margin'),
  [
    (RouterConfig(8, 2), True),
    (RouterConfig(8, 8), False),
    (RouterConfig(1, 1), False),
    (RouterConfig(8, 4, num_groups=2, top_groups=1), False),
    (RouterConfig(8, 4, num_groups=2, top_groups=2), True),
    (RouterConfig(8, 6, expert_dropout=0.25), False),
    (RouterConfig(8, 5, expert_dropout=0.25), True),
    (RouterConfig(8, 2, selection='expert_choice'), True),
    (RouterConfig(4, 4, selection='expert_choice'), False),
  ],
  ids=str,
)
def test_a_router_says_whether_its_choices_have_a_margin(
  cfg: RouterConfig, has_margin: bool
) -> None:
  assert cfg.has_margin is has_margin
  shape = (1, 4, cfg.num_experts)
  logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  rows = np.arange(1, dtype=np.int32)
  tokens = Tokens(None, np.ones((1, 4), bool), np.ones((1, 4), np.int32), rows, jax.random.key(0))
  assert np.isfinite(route(logits, None, cfg, tokens).margin).any() == has_margin


def test_no_token_and_wild_logits_are_finite(example: tuple) -> None:
  routing, unbiased, mask = example
  nothing = stacked(observed(routing, unbiased, np.zeros_like(mask)))
  with np.errstate(all='raise'):
    assert all((v == 0).all() for v in token_statistics(nothing).values())
  wild = np.where(np.random.default_rng(1).random((B, S, E)) < 0.5, -1e4, 1e4)
  with np.errstate(over='ignore'):
    routing, unbiased = routed(wild, np.zeros(E))
  found = token_statistics(stacked(observed(routing, unbiased, np.ones_like(mask))))
  assert all(np.isfinite(v).all() for v in found.values()) and found['logit_max'] == 1e4
  assert found['logit_rms'] == pytest.approx(1e4)


def test_no_gradient_passes_and_of_counts_there_is_none() -> None:
  """Why std_of_share cannot train, and why statistics cost no backward pass."""
  mask = np.ones((B, S), bool)
  base, unbiased = routed(np.random.default_rng(2).normal(size=(B, S, E)), np.zeros(E))

  def value(logits: jax.Array) -> jax.Array:
    ids = jax.lax.top_k(logits, K)[1]
    routing = base._replace(
      logits=logits, probs=jax.nn.softmax(logits), scores=jnp.exp(logits), expert_ids=ids
    )
    stats = jax.tree.map(lambda a: a[None], observe(routing, unbiased, mask))
    load = jax.nn.one_hot(ids, E).sum((0, 1, 2))[None]
    token_sum = sum(values.sum() for values in token_statistics(stats).values())
    return token_sum + layer_statistics(load, K)['std_of_share'].sum()

  assert not jax.jit(jax.grad(value), compiler_options=QUICK)(jnp.asarray(base.logits)).any()


def test_every_statistic_says_which_layer_is_worst(example: tuple) -> None:
  names = [
    *layer_statistics(loads(), 2),
    *token_statistics(stacked(observed(*example))),
    *bias_statistics(loads()),
  ]
  assert len(names) == len(set(names)) and {*names, 'churn', 'dropped'} == set(STATISTICS)
