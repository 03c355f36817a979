"""What is accepted balances: over all losses, selections and switches; padding has no say in it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moejax.config import ConfigError
from moejax.moe import MoE, MoEConfig, RouterConfig, Routing, Scope, Tokens, route
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.fit import fit_problems, untrainable
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.routing import WEIGHTS
from moejax.moe.selection import SELECTIONS
from tests.support.quick import QUICK

B, S, E, D = 2, 8, 4, 3
# Each loss with each of its switches: what of them a loss ignores is there twice.
TABLE = [
  (name, Scope(0, partition, assignment, probability))
  for name, assignment, (partition, probability) in itertools.product(
    sorted(BALANCE_LOSSES), sorted(ASSIGNMENTS), ((0, ''), (2, 'sigmoid'))
  )
]
REALS = ('logits', 'probs', 'weights', 'likely', 'router')
# Of gradients between 1e-2 and 1; where they cancel, 1e-8 is left.
NOTHING = 1e-4


def routers() -> list[RouterConfig]:
  """Every selection with one, several and all experts, however they are weighed."""
  found = []
  for selection in sorted(SELECTIONS):
    for weigh in sorted(WEIGHTS):
      found.append(RouterConfig(E, 1, weigh=weigh, selection=selection))
    found.append(RouterConfig(E, E, selection=selection))
    for top_k, renormalise in ((1, False), (2, False), (2, True)):
      found.append(RouterConfig(E, top_k, renormalise=renormalise, selection=selection))
  for top_k, renormalise in ((1, True), (1, False), (2, True)):
    base = {'num_experts': E, 'top_k': top_k, 'renormalise': renormalise, 'noisy': True}
    found.append(RouterConfig(**base))
    found.append(RouterConfig(**base, num_groups=2))
    found.append(RouterConfig(**base, expert_dropout=0.25, score_fn='sigmoid'))
  found.append(RouterConfig(E, 2, random_second=True))
  return found


def batch() -> tuple[np.ndarray, np.ndarray, Tokens]:
  """x [B, S, D], router weights [D, E], and tokens; some experts are far ahead."""
  rng = np.random.default_rng(0)
  segments = np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2], np.int32)
  ids = rng.integers(0, 9, (B, S)).astype(np.int32)
  x = rng.normal(size=(B, S, D)).astype(np.float32) + 1
  rows = np.arange(B, dtype=np.int32)
  tokens = Tokens(ids, segments > 0, segments, rows, jax.random.key(0))
  return x, rng.normal(size=(D, E)).astype(np.float32), tokens


def routed(w: Array, x: Array, tokens: Tokens, cfg: RouterConfig) -> Routing:
  std = jnp.ones((B, S, E)) if cfg.noisy else None
  return route(x @ w, None, cfg, tokens, std)._replace(router=w)


@functools.partial(jax.jit, compiler_options=QUICK)
def gradients_to_routing(
  routing: Routing, mask: np.ndarray, segments: np.ndarray
) -> tuple[Array, list[Array]]:
  """The values of the table, [n], and the gradient of each to the REALS of a routing, [n, ...]."""

  def values(reals: list[Array]) -> Array:
    there = routing._replace(**dict(zip(REALS, reals)))
    each = [BALANCE_LOSSES[name].value(there, mask, segments, scope) for name, scope in TABLE]
    return jnp.stack(each)

  value, pull = jax.vjp(values, [getattr(routing, name) for name in REALS])
  return value, jax.vmap(pull)(jnp.eye(len(TABLE)))[0]


def linearised(
  w: Array, x: Array, tokens: Tokens, cfg: RouterConfig
) -> tuple[Routing, list[np.ndarray]]:
  """A routing, and how its REALS move with the router, [..., D * E] each.

  Not compiled as a whole: its operations are shared by all routers, and compiled once.
  """

  def reals_of(w: Array) -> tuple[list[Array], Routing]:
    routing = routed(w, x, tokens, cfg)
    return [getattr(routing, name) for name in REALS], routing

  moves, routing = jax.jacfwd(reals_of, has_aux=True)(w)
  return jax.device_get(routing), [np.asarray(move).reshape(*move.shape[:-2], -1) for move in moves]


def to_router(gradients: list[np.ndarray], moves: list[np.ndarray]) -> np.ndarray:
  """Gradients to REALS, [n, ...] each, as gradients to the router, [n, D * E]."""
  parts = []
  for gradient, move in zip(gradients, moves):
    parts.append(np.asarray(gradient).reshape(len(gradient), -1) @ move.reshape(-1, D * E))
  return sum(parts)


@pytest.mark.slow
def test_what_is_accepted_has_a_gradient_and_what_is_not_says_what_to_do() -> None:
  x, w, tokens = batch()
  accepted, trained = set(), set()
  for cfg in routers():
    routing, moves = linearised(w, x, tokens, cfg)
    _, gradients = gradients_to_routing(routing, tokens.mask, tokens.segments)
    norms = np.linalg.norm(to_router(gradients, moves), axis=1)
    # An output of the model that is another one for each expert and token.
    of_weights = np.sin(1.0 + np.arange(routing.weights.size))[None]
    of_model = to_router([of_weights], [moves[REALS.index('weights')]])
    trains = bool(np.linalg.norm(of_model) > NOTHING)
    assert trains == (untrainable(cfg) == ''), cfg
    trained.add(trains)
    for (name, scope), norm in zip(TABLE, norms):
      problems = [untrainable(cfg)]
      problems += fit_problems(cfg, {name: scope}, '', loss='losses.{}', rule='bias_rule')
      told = [problem for problem in problems if problem]
      assert told or norm > NOTHING, f'{name} {scope} {cfg}: accepted, and its gradient is 0'
      assert all('use ' in problem for problem in told)
      if not told:
        accepted.add((name, cfg.selection))
  assert trained == {True, False}
  # Refusing everything would pass, too.
  assert accepted == {
    (name, selection)
    for name, selection in itertools.product(BALANCE_LOSSES, SELECTIONS)
    if (name != 'load' or selection == 'top_k') and (name, selection) != ('gshard', 'uniform')
  }


@pytest.mark.parametrize('garbage', [np.nan, np.inf])
def test_no_loss_sees_what_padding_holds(garbage: float) -> None:
  x, w, tokens = batch()
  routing = linearised(w, x, tokens, RouterConfig(E, 2, noisy=True))[0]
  padded = {}
  for name in REALS[:-1]:
    padded[name] = np.where(tokens.mask[..., None], getattr(routing, name), np.float32(garbage))
  clean = gradients_to_routing(routing, tokens.mask, tokens.segments)
  found = gradients_to_routing(routing._replace(**padded), tokens.mask, tokens.segments)
  for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(one, other)
  for name, gradient in zip(REALS[:-1], found[1]):
    assert not np.asarray(gradient)[:, ~tokens.mask].any(), name
  for name, loss in BALANCE_LOSSES.items():
    one, other = (loss.seen(r, tokens.mask, Scope()) for r in (routing, routing._replace(**padded)))
    np.testing.assert_array_equal(one, other, err_msg=name)


ALWAYS_ONE = 'router.top_k=1 of num_experts=4 with renormalise=True divides the one weight'


@pytest.mark.parametrize(
  ('router', 'scopes', 'rule', 'told'),
  [
    (RouterConfig(4, 1), {'sequence': Scope()}, '', ALWAYS_ONE),
    (RouterConfig(4, 1, weigh='softmax'), {}, 'sign', "renormalise=False with weigh='scores'"),
    (RouterConfig(4, 1, selection='sinkhorn'), {'importance': Scope()}, '', ALWAYS_ONE),
    (RouterConfig(4, 2), {'load': Scope()}, '', "scopes['load'] is the load that noise may give"),
    (RouterConfig(4, 2, noisy=True), {'load': Scope()}, 'sign', 'does not know of a bias'),
    (
      RouterConfig(4, 2, noisy=True, num_groups=2, top_groups=2),
      {'load': Scope()},
      '',
      "scopes['load'] does not know of groups: use num_groups=1",
    ),
    (RouterConfig(4, 2, selection='hash'), {}, 'sign', 'would move a bias that selection='),
    (RouterConfig(4, 4), {}, 'quantile', 'needs an expert that is not chosen'),
    (RouterConfig(4, 4), {}, 'sign', 'needs an expert that is not chosen'),
    (RouterConfig(4, 4), {'sequence': Scope()}, '', 'counts all num_experts=4 experts'),
    (RouterConfig(4, 2), {'sequence': Scope(partition=3)}, '', 'makes no groups of num_experts=4'),
    (RouterConfig(4, 2), {'sequence': Scope(partition=1)}, '', 'makes no groups of num_experts=4'),
    (
      RouterConfig(4, 2, selection='uniform'),
      {'gshard': Scope()},
      '',
      "use the loss 'micro_batch' with assignment='unbiased'",
    ),
    (
      RouterConfig(4, 2, selection='expert_choice'),
      {'sequence': Scope(assignment='dispatched')},
      '',
      "counts what selection='expert_choice' has made even",
    ),
  ],
)
def test_a_layer_alone_refuses_what_a_run_refuses(
  router: RouterConfig, scopes: dict[str, Scope], rule: str, told: str
) -> None:
  with pytest.raises(ConfigError) as error:
    MoE(jax.random.key(0), 8, MoEConfig(router, d_expert=4), scopes, rule)
  assert told in str(error.value) and 'use ' in str(error.value)


def test_a_router_that_cannot_learn_can_still_be_computed_with() -> None:
  """A published model may have it; a call says with `whole` whether the layer is trained."""
  x = jnp.ones((1, 2, 8))

  def apply(router: RouterConfig, **named: None) -> tuple[int, ...]:
    layer = MoE(jax.random.key(0), 8, MoEConfig(router, d_expert=4))
    return layer(x, **named)[0].shape

  def shape(router: RouterConfig, **named: None) -> tuple[int, ...]:
    return jax.eval_shape(lambda: jnp.zeros(apply(router, **named))).shape

  with pytest.raises(ConfigError, match='renormalise=False, or top_k=2 or more, or whole=None'):
    shape(RouterConfig(4, 1))
  assert shape(RouterConfig(4, 1), whole=None) == x.shape
  for fits in (RouterConfig(1, 1), RouterConfig(4, 1, renormalise=False)):
    assert shape(fits) == x.shape
