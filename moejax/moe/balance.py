"""How unevenly experts are used: the count, and the losses that push against it.

  routing, mask, segments -> sums over each set of tokens -> L_g = E/(K n_g^2) sum_e c_ge p_ge -> mean over sets

One loss with a switch for the *set* of tokens that f and P are taken over: a document (`sequence`), the rows of a
micro-batch, of an expert-parallel group, of the whole batch. It is 1 at perfect balance whatever E, K and the score
function. Values are without coefficient; layers are averaged.

Letters: B batch, S sequence, E experts, K experts per token, G sets of tokens, A micro-batches of one step.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from moejax.config import check, frozendict
from moejax.moe.bias import BIAS_RULES
from moejax.moe.routing import Routing
from moejax.optim import schedule_problem

ASSIGNMENTS = ('dispatched', 'unbiased')


class Scope(NamedTuple):
  """What else a loss must know to be a part of a whole batch's loss.

  rows: rows of the global batch in one set; 0: all rows at hand. A set larger than the micro-batch needs `load`.
  assignment: what f counts: 'unbiased', the top-K of the scores alone (DeepSeek-V3 eq. 18), or 'dispatched'.
  load: [E] f32, the counts of the whole set, when part of it lies in other micro-batches. f carries no gradient, so
    with f of the whole and P of the part, the parts add up to the loss and to the gradient of the whole.
  """

  rows: int = 0
  assignment: str = 'unbiased'
  load: Array | None = None


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Which losses and which bias rule keep the experts even.

  losses: name -> coefficient: a number, or a schedule such as '0.1, 0.01@10%, 0.001@70%' (openPangu's recipe). 0: off.
  bias_rule: a row of BIAS_RULES; '' for none.  bias_rate: its step, a number or a schedule.
  ep_groups: into how many expert-parallel groups of rows `ep_group` cuts the global batch.
  """

  losses: frozendict = frozendict()
  bias_rule: str = ''
  bias_rate: str = '0.001'
  ep_groups: int = 1
  assignment: str = 'unbiased'

  def __post_init__(self) -> None:
    # Every row is there, as text, so that a flag can switch any of them on.
    every = {name: '0' for name in BALANCE_LOSSES} | {name: str(value) for name, value in self.losses.items()}
    object.__setattr__(self, 'losses', frozendict(every))
    rules = sorted(BIAS_RULES)
    check(
      *(f'losses.{name} is not a balance loss: use one of {sorted(BALANCE_LOSSES)}'
        for name in self.losses if name not in BALANCE_LOSSES),
      *(schedule_problem(f'losses.{name}', value) for name, value in self.losses.items()),
      f'bias_rule={self.bias_rule!r} is not one of {rules}: use one of them, or \'\' for none'
      if self.bias_rule and self.bias_rule not in BIAS_RULES else '',
      schedule_problem('bias_rate', self.bias_rate),
      f'ep_groups={self.ep_groups}: use 1 or more' if self.ep_groups < 1 else '',
      f'assignment={self.assignment!r} is not one of {sorted(ASSIGNMENTS)}' if self.assignment not in ASSIGNMENTS
      else '',
    )

  def active(self) -> tuple[str, ...]:
    """The losses that are not switched off, sorted."""
    return tuple(sorted(name for name, value in self.losses.items() if str(value) not in ('0', '0.0')))

  def scopes(self, batch_size: int, micro_batches: int) -> frozendict:
    """Active loss -> its Scope in a step of `batch_size` rows."""
    sizes = {name: BALANCE_LOSSES[name].rows(batch_size, micro_batches, self.ep_groups) for name in self.active()}
    return frozendict({name: Scope(rows, self.assignment) for name, rows in sizes.items()})


def load(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """Copies that go to each expert, of tokens that count. [B, S, K], [B, S] -> [E] f32, sums to K * mask.sum()."""
  return assignment_matrix(expert_ids, mask, num_experts).sum((0, 1))


def assignment_matrix(expert_ids: Array, mask: Array, num_experts: int) -> Array:
  """M_te, 1 where token t is given to expert e, 0 for tokens that do not count. [B, S, E] f32."""
  chosen = jax.nn.one_hot(expert_ids, num_experts, dtype=jnp.float32).sum(2)
  return chosen * mask[..., None]


def counted_ids(routing: Routing, assignment: str) -> Array:
  """The experts that f counts, [B, S, K]: the ones dispatched to, or the top-K of the scores without the bias."""
  if assignment == 'dispatched':
    return routing.expert_ids
  return jax.lax.top_k(jax.lax.stop_gradient(routing.scores), routing.expert_ids.shape[-1])[1]


def document_sums(values: Array, segments: Array) -> Array:
  """Sums over each (row, segment). [B, S, n] -> [B * (S + 1), n]; documents that are not there sum to 0."""
  num_segments = segments.shape[1] + 1
  sums = jax.vmap(lambda v, ids: jax.ops.segment_sum(v, ids, num_segments))(values, segments)
  return sums.reshape(-1, values.shape[-1])


def row_sums(values: Array, rows: int) -> Array:
  """Sums over each run of `rows` rows. [B, S, n] -> [G, n]."""
  return values.reshape(max(1, values.shape[0] // rows), -1, values.shape[-1]).sum(1)


def set_balance(routing: Routing, mask: Array, set_sums: Callable[[Array], Array], scope: Scope) -> Array:
  """Mean over the sets that hold a token of `E/(K n^2) sum_e c_e P_e`, c a count and P a sum over the set.

  With f_e = E/(K n) c_e and P_e / n the mean probability this is sum_e f_e P_e (DeepSeek-V3 eq. 17-20 for a
  sequence, 2501.11873 eq. 2-6 for a global batch). The gradient goes through P to the logits of *every* expert.
  """
  num_experts, top_k = routing.probs.shape[-1], routing.expert_ids.shape[-1]
  weight = mask.astype(jnp.float32)[..., None]
  assigned = assignment_matrix(counted_ids(routing, scope.assignment), mask, num_experts)
  sums = set_sums(jnp.concatenate([routing.probs * weight, assigned, weight], axis=-1))  # [G, 2E + 1]
  probs, counts, tokens = jnp.split(sums, [num_experts, 2 * num_experts], axis=-1)
  if scope.load is None:
    f = num_experts / top_k * counts / jnp.maximum(tokens, 1.0)
  else:
    f = num_experts * scope.load / jnp.maximum(scope.load.sum(), 1.0)
  per_set = (jax.lax.stop_gradient(f) * probs / jnp.maximum(tokens, 1.0)).sum(-1)
  return per_set.sum() / jnp.maximum((tokens > 0).sum(), 1)


def sequence(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Balance within each document, DeepSeek-V3 eq. 17-20: a packed row is as many sequences as it has documents.

  For sigmoid scores P is the sigmoid normalised over all experts (eq. 19), not a softmax.
  """
  return set_balance(routing, mask, lambda values: document_sums(values, segments), scope)


def rows(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Balance within each run of `scope.rows` rows, wherever documents begin and end.

  `micro_batch`: its value depends on how the batch is cut, by definition (Switch Transformer's auxiliary loss taken on
  each micro-batch). `ep_group`: the union of the rows of one expert-parallel group; Pangu Ultra MoE (2505.04519) says
  so in words, and its equation was not at hand. `global_batch`: all rows, 2501.11873 eq. 2-6.
  """
  del segments
  return set_balance(routing, mask, lambda values: row_sums(values, scope.rows or values.shape[0]), scope)


def router_z(routing: Routing, mask: Array, segments: Array, scope: Scope = Scope()) -> Array:
  """Mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906): keeps logits small; says nothing about balance."""
  del segments, scope
  z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
  return (z * mask).sum() / jnp.maximum(mask.sum(), 1)


def shares(loss: str, mask: Array, segments: Array, scope: Scope) -> Array:
  """What part of the batch's loss each micro-batch's is: weights that sum to 1. [A, b, S] each -> [A] f32.

  A mean over sets is the micro-batches' means weighed by how many sets each holds; where a set spans micro-batches,
  by its tokens. It depends on masks alone, so it is known before the first micro-batch is differentiated.
  """
  parts = BALANCE_LOSSES[loss].parts(mask.astype(jnp.float32)[..., None], segments, scope)
  return parts / jnp.maximum(parts.sum(), 1.0)


def token_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over tokens: each micro-batch by its tokens. [A, b, S, 1] -> [A]."""
  del segments, scope
  return tokens.sum((1, 2, 3))


def document_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over documents: each micro-batch by its documents."""
  del scope
  return jax.vmap(lambda t, s: (document_sums(t, s) > 0).sum())(tokens, segments).astype(jnp.float32)


def row_parts(tokens: Array, segments: Array, scope: Scope) -> Array:
  """A mean over sets of rows: each micro-batch by its sets, or by its tokens in the set that it is a part of."""
  del segments
  micro_batches, micro_rows = tokens.shape[:2]
  if scope.rows <= micro_rows:
    return jax.vmap(lambda t: (row_sums(t, scope.rows) > 0).sum())(tokens).astype(jnp.float32)
  per_set = tokens.sum((1, 2, 3)).reshape(-1, scope.rows // micro_rows)        # [sets, micro-batches of a set]
  return (per_set / jnp.maximum(per_set.sum(1, keepdims=True), 1.0)).reshape(micro_batches)


def spans_micro_batches(scopes: frozendict, micro_rows: int) -> tuple[str, ...]:
  """The losses with sets larger than a micro-batch: they need the load of the whole set before any gradient."""
  return tuple(name for name, scope in scopes.items() if scope.rows > micro_rows)


class BalanceLoss(NamedTuple):
  """`value(routing, mask, segments[, scope]) -> scalar`; `parts`, see `shares`; `rows` of one set, 0 if not rows."""

  value: Callable[..., Array]
  parts: Callable[[Array, Array, Scope], Array]
  rows: Callable[[int, int, int], int]   # of (batch_size, micro_batches, ep_groups)


BALANCE_LOSSES: dict[str, BalanceLoss] = {
  'ep_group': BalanceLoss(rows, row_parts, lambda batch, micro_batches, groups: batch // groups),
  'global_batch': BalanceLoss(rows, row_parts, lambda batch, micro_batches, groups: batch),
  'micro_batch': BalanceLoss(rows, row_parts, lambda batch, micro_batches, groups: batch // micro_batches),
  'router_z': BalanceLoss(router_z, token_parts, lambda batch, micro_batches, groups: 0),
  'sequence': BalanceLoss(sequence, document_parts, lambda batch, micro_batches, groups: 0),
}
