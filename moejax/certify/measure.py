"""Every registered balance loss with its switches, measured on a batch of logits.

  inputs -> routing -> value of each loss, gradients to the routing -> gradients to the inputs

Letters: B batch, S sequence, D model, E experts, n losses measured.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.batches import B, Case, S
from moejax.certify.cases import EP_GROUPS, MICRO_BATCHES, Plan
from moejax.moe import balance, routing, selection
from moejax.moe.token_sets import Scope

# One loss, that of DeepSeek-V3 eq. 17-20, with other sets of tokens; a set's kind is its name.
CANONICAL = ('ep_group', 'global_batch', 'micro_batch', 'sequence')
REALS = ('logits', 'scores', 'probs', 'weights', 'likely', 'router')  # fields of a Routing
D = 6  # of the weights of the router that SimBal looks at
# SimBal is a sum of absolute values: none may change its sign within a step of finite differences,
# which moves it by some 3e-5.
NEAREST_KINK = 2e-4


class Loss(NamedTuple):
  """A row of BALANCE_LOSSES, and how its switches stand."""

  name: str
  assignment: str = 'unbiased'
  partition: int = 0
  probability: str = ''

  def __str__(self) -> str:
    switches = (self.assignment, self.partition, self.probability)
    return ' '.join([self.name, *(str(switch) for switch in switches if switch)])


class Inputs(NamedTuple):
  """What a loss may have a gradient to."""

  logits: np.ndarray  # [B, S, E]
  std: np.ndarray  # [B, S, E], of the noise where the router has some
  router: np.ndarray  # [D, E], its weights


class Measured(NamedTuple):
  """All losses on one batch, as NumPy arrays."""

  values: np.ndarray  # [n]
  gradients: Inputs  # [n, ...] each
  sizes: np.ndarray  # [n], norms of the gradients before they cancel out
  to_bias: np.ndarray  # [n, E], gradients to the bias
  routing: routing.Routing
  draws: np.ndarray  # [B, S, E], the noise in units of its std


def losses(cfg: routing.RouterConfig) -> tuple[Loss, ...]:
  """Every registered loss; each of CANONICAL with each value of each switch."""
  rows: list[Loss] = []
  for name in sorted(balance.BALANCE_LOSSES):
    if name in CANONICAL:
      rows += [Loss(name, assignment) for assignment in balance.ASSIGNMENTS]
    else:
      rows.append(Loss(name))
  parts = sorted({2, cfg.num_experts // 2})
  rows += [Loss(name, 'dispatched', m) for name, m in itertools.product(CANONICAL, parts)]
  score_fns = sorted(routing.SCORE_FNS)
  rows += [Loss(name, 'unbiased', 0, fn) for name, fn in itertools.product(CANONICAL, score_fns)]
  return tuple(rows)


def scope(
  loss: Loss, rows: int, micro_batches: int = MICRO_BATCHES, ep_groups: int = EP_GROUPS
) -> Scope:
  """The scope of a loss on a batch of so many rows."""
  size = balance.BALANCE_LOSSES[loss.name].rows(rows, micro_batches, ep_groups)
  return Scope(size, loss.partition, loss.assignment, loss.probability)


def values(routed: routing.Routing, mask: Array, segments: Array, rows: tuple[Loss, ...]) -> Array:
  """The value of each loss of a routing. mask, segments [B, S] -> [n]."""
  each = []
  for row in rows:
    value = balance.BALANCE_LOSSES[row.name].value
    each.append(value(routed, mask, segments, scope(row, mask.shape[0])))
  return jnp.stack(each)


def tokens_of(mask: Array, segments: Array) -> selection.Tokens:
  """What a selection may see; ids as in a text, some of them twice."""
  rows, places = jnp.indices(mask.shape)
  ids, row_numbers = (3 * rows + 5 * places) % 17, jnp.arange(mask.shape[0])
  return selection.Tokens(ids, mask, segments, row_numbers, jax.random.key(3))


def route_with_noise(
  inputs: Inputs, bias: Array, mask: Array, segments: Array, cfg: routing.RouterConfig
) -> tuple[routing.Routing, Array]:
  """The routing of a batch, and the noise drawn for it [B, S, E] in units of its std."""
  tokens = tokens_of(mask, segments)
  # The router draws the same from these tokens: the oracle, which cannot, is given the noise.
  shape = (cfg.num_experts,)
  draws = selection.draw_by_token(
    lambda key: jax.random.normal(key, shape), tokens, selection.NOISE
  )
  routed = routing.route(inputs.logits, bias, cfg, tokens, inputs.std)
  return routed._replace(router=inputs.router), draws


def differentiate(
  routed: routing.Routing, mask: Array, segments: Array, rows: tuple[Loss, ...]
) -> tuple[Array, list[Array]]:
  """Values [n] of each loss, and their gradients to the REALS of the routing, [n, ...] each."""

  def values_of(reals: list[Array]) -> Array:
    return values(routed._replace(**dict(zip(REALS, reals))), mask, segments, rows)

  value, pull = jax.vjp(values_of, [getattr(routed, name) for name in REALS])
  # One row of the identity asks for the gradient of one loss.
  return value, jax.vmap(pull)(jnp.eye(len(rows)))[0]


def pull_back(
  inputs: Inputs,
  bias: Array,
  mask: Array,
  segments: Array,
  gradients: list[Array],
  cfg: routing.RouterConfig,
) -> tuple[Inputs, Array]:
  """Gradients to the REALS of a routing as gradients to the router's inputs and to the bias.

  gradients: [n, ...] each, and so are those returned.
  """

  def reals_of(inputs: Inputs, bias: Array) -> list[Array]:
    routed, _ = route_with_noise(inputs, bias, mask, segments, cfg)
    return [getattr(routed, name) for name in REALS]

  return jax.vmap(jax.vjp(reals_of, inputs, bias)[1])(gradients)


def measure(plan: Plan, cfg: routing.RouterConfig, case: Case) -> Measured:
  """All losses on one batch.

  Three programs: the middle one, of the losses, takes long to compile and does not know how the
  router scores.
  """
  batch = (inputs_of(plan, case), case.bias, case.mask, case.segments)
  routed, draws = plan.program(route_with_noise, cfg)(*batch)
  value, gradients = plan.program(differentiate, losses(cfg))(routed, case.mask, case.segments)
  to_inputs, to_bias = plan.program(pull_back, cfg)(*batch, gradients)
  measured = Measured(
    values=value,
    gradients=to_inputs,
    sizes=sizes(routed, gradients, losses(cfg)),
    to_bias=to_bias,
    routing=routed,
    draws=draws,
  )
  return jax.tree.map(np.asarray, measured)


def sizes(routed: routing.Routing, gradients: list[Array], rows: tuple[Loss, ...]) -> np.ndarray:
  """How large each loss's gradient is before it cancels out. [n].

  That is the norm of the gradient to the logarithms of probabilities and weights; the largest over
  the rows of one loss, which differ by their switches alone.
  """
  terms = []
  for name, gradient in zip(REALS, gradients):
    if name in ('probs', 'weights', 'likely'):
      terms.append(np.asarray(gradient * getattr(routed, name)).reshape(len(rows), -1))
  norms = np.linalg.norm(np.concatenate(terms, axis=1), axis=1)
  largest: dict[str, float] = {}
  for norm, row in zip(norms, rows):
    largest[row.name] = max(largest[row.name], norm) if row.name in largest else norm
  return np.array([largest[row.name] for row in rows])


def inputs_of(plan: Plan, case: Case) -> Inputs:
  """The case's logits, with a noise and with router weights of their own."""
  experts = case.logits.shape[-1]
  rng = plan.rng(2, experts)
  std = rng.uniform(0.5, 1.5, (B, S, experts)).astype(np.float32)
  router = plan.once(('router', experts), lambda: draw_router(rng, experts))
  return Inputs(case.logits, std, router)


def draw_router(rng: np.random.Generator, num_experts: int) -> np.ndarray:
  """Weights of a router at which SimBal is smooth. [D, E] f32.

  Raises:
    ValueError: none of 1000 draws is far enough from where SimBal has a kink.
  """
  for _ in range(1000):
    router = rng.normal(size=(D, num_experts)).astype(np.float32)
    w = router.astype(np.float64)
    if np.abs(w.T @ w - np.eye(num_experts)).min() > NEAREST_KINK:
      return router
  raise ValueError(f'none of 1000 routers of {num_experts} experts is {NEAREST_KINK} from a kink')
