"""Every registered balance loss with its switches, measured on a batch of logits: values and gradients in one program.

Letters: B batch, S sequence, D model, E experts, n losses measured.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.certify.cases import EP_GROUPS, MICRO_BATCHES, B, Case, Plan, S
from moejax.moe import balance, routing, selection
from moejax.moe.token_sets import Scope

CANONICAL = (
  'ep_group',
  'global_batch',
  'micro_batch',
  'sequence',
)  # one loss; its sets are its name
REALS = ('logits', 'scores', 'probs', 'weights', 'likely', 'router')  # of a Routing
D = 6  # of the weights of the router that SimBal looks at


class Loss(NamedTuple):
  """A row of BALANCE_LOSSES, and how its switches stand."""

  name: str
  assignment: str = 'unbiased'
  partition: int = 0
  probability: str = ''

  def __str__(self) -> str:
    return ' '.join(
      [self.name, *(str(s) for s in (self.assignment, self.partition, self.probability) if s)]
    )


class Inputs(NamedTuple):
  """What a loss may have a gradient to."""

  logits: np.ndarray  # [B, S, E]
  std: np.ndarray  # [B, S, E], of the noise where the router has some
  router: np.ndarray  # [D, E], its weights


class Measured(NamedTuple):
  """NumPy arrays of one batch."""

  values: np.ndarray  # [n]
  gradients: Inputs  # [n, ...] each
  sizes: np.ndarray  # [n], of the gradients before they cancel out
  to_bias: np.ndarray  # [n, E]
  routing: routing.Routing
  draws: np.ndarray  # [B, S, E], the noise in units of its std


def losses(cfg: routing.RouterConfig) -> tuple[Loss, ...]:
  """Every registered loss; the canonical one with each value of each switch."""
  found: list[Loss] = []
  for name in sorted(balance.BALANCE_LOSSES):
    found += (
      [Loss(name, assignment) for assignment in balance.ASSIGNMENTS]
      if name in CANONICAL
      else [Loss(name)]
    )
  parts = sorted({2, cfg.num_experts // 2})
  found += [Loss(name, 'dispatched', m) for name, m in itertools.product(CANONICAL, parts)]
  found += [
    Loss(*pair)
    for pair in itertools.product(CANONICAL, ['unbiased'], [0], sorted(routing.SCORE_FNS))
  ]
  return tuple(found)


def scope(
  loss: Loss, rows: int, micro_batches: int = MICRO_BATCHES, ep_groups: int = EP_GROUPS
) -> Scope:
  """The scope of a loss on a batch of so many rows."""
  size = balance.BALANCE_LOSSES[loss.name].rows(rows, micro_batches, ep_groups)
  return Scope(size, loss.partition, loss.assignment, loss.probability)


def values(routed: routing.Routing, mask: Array, segments: Array, rows: tuple[Loss, ...]) -> Array:
  """Each loss of a routing. [n]."""
  return jnp.stack(
    [
      balance.BALANCE_LOSSES[row.name].value(routed, mask, segments, scope(row, mask.shape[0]))
      for row in rows
    ]
  )


def tokens_of(mask: Array, segments: Array) -> selection.Tokens:
  """What a selection may see; ids as in a text, some of them twice."""
  rows, places = jnp.indices(mask.shape)
  return selection.Tokens(
    (3 * rows + 5 * places) % 17, mask, segments, jnp.arange(mask.shape[0]), jax.random.key(3)
  )


def routed(
  inputs: Inputs, bias: Array, mask: Array, segments: Array, cfg: routing.RouterConfig
) -> tuple[routing.Routing, Array]:
  """The routing of a batch, and the noise drawn for it in units of its std."""
  tokens = tokens_of(mask, segments)
  keys = selection.row_keys(tokens, selection.NOISE)
  draws = jax.vmap(lambda key: jax.random.normal(key, inputs.logits.shape[1:]))(keys)
  return routing.route(inputs.logits, bias, cfg, tokens, inputs.std)._replace(
    router=inputs.router
  ), draws


def differentiate(
  found: routing.Routing, mask: Array, segments: Array, rows: tuple[Loss, ...]
) -> tuple[Array, list[Array]]:
  """Values [n] of each loss, and their gradients to the real numbers of the routing, [n, ...] each."""

  def of(reals: list[Array]) -> Array:
    return values(found._replace(**dict(zip(REALS, reals))), mask, segments, rows)

  value, pull = jax.vjp(of, [getattr(found, name) for name in REALS])
  return value, jax.vmap(pull)(jnp.eye(len(rows)))[0]


def pull_back(
  inputs: Inputs,
  bias: Array,
  mask: Array,
  segments: Array,
  gradients: list[Array],
  cfg: routing.RouterConfig,
) -> tuple[Inputs, Array]:
  """Gradients to a routing's real numbers as gradients to the router's inputs and to the bias. [n, ...] each."""

  def of(inputs: Inputs, bias: Array) -> list[Array]:
    found, _ = routed(inputs, bias, mask, segments, cfg)
    return [getattr(found, name) for name in REALS]

  return jax.vmap(jax.vjp(of, inputs, bias)[1])(gradients)


def measured(plan: Plan, cfg: routing.RouterConfig, case: Case) -> Measured:
  """All losses on one batch.

  Three programs: the middle one, of the losses, takes long to compile and does not know how the router scores.
  """
  batch = (inputs_of(plan, case), case.bias, case.mask, case.segments)
  found, draws = plan.program(routed, cfg)(*batch)
  value, gradients = plan.program(differentiate, losses(cfg))(found, case.mask, case.segments)
  to_inputs, to_bias = plan.program(pull_back, cfg)(*batch, gradients)
  return jax.tree.map(
    np.asarray,
    Measured(value, to_inputs, sizes(found, gradients, losses(cfg)), to_bias, found, draws),
  )


def sizes(found: routing.Routing, gradients: list[Array], rows: tuple[Loss, ...]) -> np.ndarray:
  """How large each loss's gradient is before it cancels out: to the logarithms of probabilities and weights. [n].

  The largest over the rows of one loss, which differ by their switches alone.
  """
  terms = [
    np.asarray(g * getattr(found, name)).reshape(len(rows), -1)
    for name, g in zip(REALS, gradients)
    if name in ('probs', 'weights', 'likely')
  ]
  each = np.linalg.norm(np.concatenate(terms, axis=1), axis=1)
  return np.array(
    [max(size for size, other in zip(each, rows) if other.name == row.name) for row in rows]
  )


def inputs_of(plan: Plan, case: Case) -> Inputs:
  """The case's logits, with a noise and with router weights of their own."""
  rng, experts = plan.rng(2, case.logits.shape[-1]), case.logits.shape[-1]
  return Inputs(
    case.logits,
    rng.uniform(0.5, 1.5, (B, S, experts)).astype(np.float32),
    rng.normal(size=(D, experts)).astype(np.float32),
  )
