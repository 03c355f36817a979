"""The oracle of balance losses for many tokens at a time, and many losses at one point.

The same sums as moejax/certify/oracle/balance.py, against which it is held.
"""

from collections.abc import Callable

import numpy as np

from moejax.certify.batches import Case
from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.routing import RouterConfig
from tests.moe.balance.loss_cases import EP_GROUPS, MICRO_BATCHES, PROBABILITIES, Row
from tests.support import oracle


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
