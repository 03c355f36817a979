"""The MoE layer against the oracle: output, aux, and the gradient of every parameter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.certify.oracle import balance as oracle_balance
from moejax.config import frozendict
from moejax.moe.bias import BIAS_RULES
from moejax.moe.layer import MoE, MoEAux, MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.selection import SELECTIONS
from moejax.moe.token_sets import Scope
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.moe.layer_cases import (
  COEFFICIENTS,
  DY,
  FIRST,
  GPT_OSS,
  LAYERS,
  NOISY,
  QWEN2,
  SELECTED,
  TIGHT,
  B,
  S,
  forward,
  given,
  given_to,
  layer,
  layers,
  output,
  parameters,
  ran,
  run,
  scopes_for,
  with_parameters,
)
from tests.moe.layer_oracle import Wanted, oracle_layer
from tests.support import oracle
from tests.support.quick import QUICK


def check_forward(cfg: MoEConfig, y: np.ndarray, aux: MoEAux, want: Wanted) -> None:
  """Output, and all of the aux but its losses."""
  g, experts = given_to(cfg), cfg.router.num_experts
  np.testing.assert_allclose(y, want.y, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(np.sort(aux.expert_ids[g.mask]), np.sort(want.expert_ids[g.mask]))
  load = oracle_balance.load(want.expert_ids, g.mask, experts)
  np.testing.assert_array_equal(aux.load, load)
  np.testing.assert_array_equal(aux.seen, load, err_msg='without a rule the load is what is seen')
  copies = load.sum()
  np.testing.assert_allclose(aux.dropped, (copies - want.kept.sum()) / copies, rtol=1e-6)
  assert (aux.dropped > 0) == (cfg.dispatch.capacity_factor > 0)
  assert aux.stats.tokens == g.mask.sum() and aux.stats.copies == copies
  np.testing.assert_array_equal(np.diag(aux.stats.pairs), load)
  elsewhere = sum(
    len(set(ids) - set(best) - {experts})
    for ids, best in zip(want.expert_ids[g.mask].tolist(), want.best_ids[g.mask].tolist())
  )
  assert aux.stats.overrides == elsewhere
  assert elsewhere or cfg is NOISY, (
    'what decides besides the scores decides something, or this tests little'
  )


def check_gradients(cfg: MoEConfig) -> None:
  g, p = given_to(cfg), parameters(layer(cfg))
  y, aux, (to_moe, to_x, to_bias) = ran(cfg)
  want = oracle_layer(cfg, p, g.x)
  check_forward(cfg, y, aux, want)
  assert set(aux.losses) == set(scopes_for(cfg)) and not aux.whole
  for name, value in aux.losses.items():
    np.testing.assert_allclose(value, want.losses[name], rtol=2e-6, atol=1e-7, err_msg=name)
  assert ('load' in aux.losses) == cfg.router.noisy
  # Without noise, and where the first choice is drawn: these would have no gradient.
  assert {*want.losses} - {*aux.losses} <= {'load', 'gshard'}
  assert not to_bias.any(), 'the bias has a gradient'

  def objective(p: dict[str, np.ndarray]) -> float:
    out = oracle_layer(cfg, p, p['x'], want)
    return float((out.y * DY).sum()) + sum(
      COEFFICIENTS[name] * out.losses[name] for name in aux.losses
    )

  p['x'] = g.x.astype(np.float64)
  for i, (name, gradient) in enumerate((parameters(to_moe) | {'x': to_x}).items()):
    direction = np.random.default_rng(i).normal(size=gradient.shape)
    slope = oracle.slope(lambda a, name=name: objective(p | {name: a}), p[name], direction)
    np.testing.assert_allclose(
      (gradient * direction).sum(),
      slope,
      rtol=2e-5,
      atol=1e-5 * np.linalg.norm(gradient),
      err_msg=name,
    )


@layers(FIRST)
def test_output_aux_and_gradients_are_the_oracles(cfg: MoEConfig) -> None:
  check_gradients(cfg)


@pytest.mark.slow
@layers([cfg for cfg in LAYERS if cfg not in FIRST])
def test_output_aux_and_gradients_of_the_others_are_the_oracles(cfg: MoEConfig) -> None:
  check_gradients(cfg)


@layers([*TIGHT, *SELECTED])
def test_outputs_of_all_selections_and_dispatchers_are_the_oracles(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  y, aux = output(cfg, g)
  check_forward(cfg, y, aux, oracle_layer(cfg, parameters(layer(cfg)), g.x))
  assert cfg in FIRST or not (aux.losses or aux.whole)


def test_every_selection_is_looked_at() -> None:
  assert {cfg.router.selection for cfg in SELECTED} == set(SELECTIONS)
  cfg = next(cfg for cfg in SELECTED if cfg.router.selection == 'expert_choice')
  uneven = output(cfg, given(4))[1].expert_ids
  counts = (uneven < 4).sum(-1)[given(4).mask]
  assert {0, 1} < set(counts.tolist()), (
    'expert choice gives some tokens no expert and some more than one'
  )


def test_dispatchers_agree() -> None:
  first, other = (ran(cfg) for cfg in FIRST[:2])
  for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_what_is_known_of_a_larger_set_comes_from_outside() -> None:
  """f is that of the whole set, P that of the tokens at hand.

  What is seen here goes out to be added up.
  """
  cfg, g, counts = FIRST[0], given(8), np.arange(8, dtype=np.float32)
  wide = frozendict(
    {'global_batch': Scope(2 * B), 'importance': Scope(2 * B), 'micro_batch': Scope(1)}
  )
  moe = with_parameters(layer(cfg), lambda name, a: a)
  moe.scopes = wide
  whole = {'global_batch': counts, 'importance': counts}
  _, aux = jax.jit(lambda moe: moe(g.x, g.bias, g.tokens(), whole), compiler_options=QUICK)(moe)
  want = oracle_layer(cfg, parameters(layer(cfg)), g.x)
  p = oracle.probabilities(want.logits, cfg.router.score_fn)
  f = 8 * counts / counts.sum()
  np.testing.assert_allclose(aux.losses['global_batch'], (f * p[g.mask].mean(0)).sum(), rtol=1e-6)
  np.testing.assert_allclose(
    aux.losses['importance'], oracle_balance.squared_variation(counts), rtol=1e-6
  )
  np.testing.assert_allclose(
    aux.losses['micro_batch'], ran(cfg)[1].losses['micro_batch'], rtol=1e-6
  )
  assert set(aux.whole) == set(whole)
  np.testing.assert_array_equal(
    aux.whole['global_batch'], oracle_balance.load(want.best_ids, g.mask, 8)
  )
  weights = oracle.weigh_chosen(
    oracle.log_scores(want.logits, 'softmax'), want.expert_ids, True, cfg.router.scale
  )
  gates = [weights[g.mask][want.expert_ids[g.mask] == e].sum() for e in range(8)]
  np.testing.assert_allclose(aux.whole['importance'], gates, rtol=1e-6)


def test_what_a_bias_rule_sees_is_of_the_tokens_that_count() -> None:
  """As the rule makes it of the same routing: the load, or a histogram."""
  cfg = dataclasses.replace(FIRST[0], router=RouterConfig(8, 2))
  g = given(8)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def seen(layers: dict[str, MoE], mask: Array) -> dict[str, tuple[Array, Array]]:
    tokens = g.tokens()._replace(mask=mask)
    return {
      rule: (
        moe(g.x, g.bias, tokens, None)[1].seen,
        BIAS_RULES[rule].observe(moe.route(g.x, g.bias, tokens), g.bias, mask),
      )
      for rule, moe in layers.items()
    }

  layers_of = {rule: layer(cfg, rule) for rule in ('sign', 'quantile')}
  for mask, tokens in ((g.mask, g.mask.sum()), (np.zeros((B, S), bool), 0)):
    for rule, (got, want) in seen(layers_of, mask).items():
      np.testing.assert_array_equal(got, want, err_msg=rule)
      assert got.sum() == tokens * (2 if rule == 'sign' else 8), (
        'every copy, or every expert of every token'
      )


@layers([FIRST[0], FIRST[2]])
def test_recorded_experts_are_used_again_and_weighed_anew(cfg: MoEConfig) -> None:
  g, (y, aux, gradients) = given_to(cfg), ran(cfg)
  record = g.tokens()._replace(replayed=aux.expert_ids)
  again = run(layer(cfg), g.x, -g.bias, record, DY)  # another bias has no say
  np.testing.assert_allclose(again[0], y, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(again[1].expert_ids, aux.expert_ids)
  np.testing.assert_array_equal(again[1].load, aux.load)
  for a, b in zip(
    jax.tree.leaves((again[2], again[1].losses)),
    jax.tree.leaves((gradients, aux.losses)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  other = with_parameters(layer(cfg), lambda name, a: -a if 'router' in name else a)
  moved = run(other, g.x, g.bias, record, DY)
  np.testing.assert_array_equal(moved[1].expert_ids, aux.expert_ids)
  p = parameters(other)
  like = oracle_layer(cfg, parameters(layer(cfg)), g.x)._replace(expert_ids=aux.expert_ids)
  np.testing.assert_allclose(moved[0], oracle_layer(cfg, p, g.x, like).y, rtol=1e-5, atol=1e-5)
  assert np.abs(moved[0] - y).max() > 1e-2


def test_without_a_key_nothing_is_random_and_the_logits_are_clean() -> None:
  """Evaluation of a router that is noisy in training."""
  g, p = given(4), parameters(layer(NOISY))
  y, aux = forward(layer(NOISY), g.x, g.bias, g.tokens())
  plain = dataclasses.replace(NOISY, router=RouterConfig(4, 2, 'sigmoid'))
  np.testing.assert_allclose(y, oracle_layer(plain, p, g.x).y, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(y) - ran(NOISY)[0]).max() > 1e-2


@layers([GPT_OSS, QWEN2])
def test_computes_in_the_dtype_of_x(cfg: MoEConfig) -> None:
  g, half = given_to(cfg), jnp.bfloat16
  y, aux = forward(layer(cfg), jnp.asarray(g.x, half), g.bias, g.tokens())
  assert y.dtype == half and aux.load.dtype == jnp.int32
  exact = oracle_layer(
    cfg, parameters(layer(cfg)), np.asarray(jnp.asarray(g.x, half), np.float64)
  ).y
  assert np.abs(np.asarray(y, np.float32) - exact)[g.mask].max() < 0.03 * np.abs(exact).max()


@pytest.mark.slow
@layers([GPT_OSS, QWEN2])
def test_a_mesh_changes_nothing(cfg: MoEConfig) -> None:
  g = given_to(cfg)
  with jax.set_mesh(make_mesh(MeshConfig(expert=2, tensor=4))):
    got = run(layer(cfg), g.x, g.bias, g.tokens(), DY)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(ran(cfg)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
