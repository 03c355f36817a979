"""The value that a claim promises, in float64 NumPy; and the parts that a mistake may change.

  claim, given -> oracle -> value
  claim, given -> Parts -> (mistakes) -> value of f times P

Letters: L layers, B batch, S sequence, E experts, K experts per token.
"""

from typing import NamedTuple

import numpy as np

from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.given import Given
from moejax.certify.oracle import balance as oracle_balance
from moejax.certify.oracle import selection as oracle_selection
from moejax.certify.oracle.routing import F64, I64, Bool, probabilities


class Parts(NamedTuple):
  """What a loss f times P is made of, and how its sums are taken."""

  p: F64  # [L, B, S, E]
  chosen: I64  # [L, B, S, any]
  mask: Bool  # [B, S]  tokens in P
  load_mask: Bool  # [B, S]  tokens in f
  sets: I64  # [B, S]
  pooled: bool
  partition: int  # groups of experts that are balanced; 0: single experts
  all_positions: bool = False  # P is divided by all positions of a set, padding included
  length_power: int = 0  # sets weigh by this power of their length


def sets_of_claim(claim: Claim, segment_ids: I64) -> I64:
  """The set of every token, [B, S]; -1 for none."""
  if claim.like == 'sequence':
    return oracle_balance.document_sets(segment_ids)
  return oracle_balance.row_sets(segment_ids.shape, claim.row_sets)


def product_parts(claim: Claim, given: Given) -> Parts:
  """The parts as the equation has them."""
  chosen = given.expert_ids[..., :1] if claim.like == 'gshard' else given.expert_ids
  return Parts(
    p=probabilities(given.logits, claim.probability or claim.score_fn),
    chosen=chosen,
    mask=given.mask,
    load_mask=given.mask,
    sets=sets_of_claim(claim, given.segment_ids),
    pooled=claim.pooled,
    partition=claim.partition,
  )


def pooled_layers(values: np.ndarray) -> np.ndarray:
  """Layers as more rows of one: [L, B, ...] -> [1, L B, ...]."""
  return values.reshape(1, -1, *values.shape[2:])


def promised_product(claim: Claim, given: Given) -> float:
  """The oracle's loss f times P, without factor: a mean over layers, or of all layers pooled."""
  parts = product_parts(claim, given)
  p, chosen, mask, sets = parts.p, parts.chosen, parts.mask, parts.sets
  if claim.pooled:
    p, chosen = pooled_layers(p), pooled_layers(chosen)
    mask, sets = np.tile(mask, (claim.layers, 1)), np.tile(sets, (claim.layers, 1))
  of_layers = []
  for p_of_layer, ids in zip(p, chosen):
    losses = oracle_balance.probability_losses(p_of_layer, ids, mask, sets, claim.partition)
    of_layers.append(oracle_balance.mean_over_sets(losses))
  return float(np.mean(of_layers))


def weights_of_claim(claim: Claim, logits: F64, expert_ids: I64) -> F64:
  """The weights of a choice, [..., K] of logits [..., E]."""
  by_softmax = claim.weigh == 'softmax'
  logs = logits if by_softmax else oracle_selection.log_scores(logits, claim.score_fn)
  return oracle_selection.weigh_chosen(logs, expert_ids, claim.renormalise, claim.scale)


def likely_of(claim: Claim, given: Given) -> F64:
  """The chance of each expert to be chosen, given the noise of the others. [L, B, S, E]."""
  noisy = given.logits + given.noise
  return oracle_selection.likely(given.logits, noisy, given.std, claim.top_k)


def of_one_layer(claim: Claim, given: Given, layer: int) -> float:
  """The oracle's loss of one layer that is not f times P, without factor."""
  logits, mask, ids = given.logits[layer], given.mask, given.expert_ids[layer]
  if claim.like == 'router_z':
    return oracle_balance.router_z(logits, mask)
  if claim.like == 'importance':
    weights = weights_of_claim(claim, logits, ids)
    return oracle_balance.importance(weights, ids, mask, claim.num_experts)
  if claim.like == 'load':
    one = given._replace(logits=logits, noise=given.noise[layer], std=given.std[layer])
    return oracle_balance.smooth_load(likely_of(claim, one), mask)
  assert claim.like == 'simbal', claim.like
  return oracle_balance.simbal(given.router)


def promised(claim: Claim, given: Given) -> float:
  """The value that the function is to return, by the oracle, times the claim's factor."""
  if claim.is_product:
    return claim.factor * promised_product(claim, given)
  of_layers = [of_one_layer(claim, given, layer) for layer in range(len(given.logits))]
  return claim.factor * float(np.mean(of_layers))


def product(parts: Parts) -> float:
  """The loss f times P of parts that may be mistaken; of right ones it is `promised_product`."""
  p, chosen, layers = parts.p, parts.chosen, len(parts.p)
  mask, load_mask, sets = parts.mask, parts.load_mask, parts.sets
  if parts.pooled:
    p, chosen = pooled_layers(p), pooled_layers(chosen)
    mask, load_mask, sets = (np.tile(array, (layers, 1)) for array in (mask, load_mask, sets))
  experts = p.shape[-1]
  size = experts // parts.partition if parts.partition else 1
  of_layers = []
  for p_of_layer, ids in zip(p, chosen):
    losses, shares = [], []
    for g in range(int(sets.max()) + 1):
      of_set = sets == g
      here = of_set & mask
      if not here.any():
        continue
      counts = np.bincount(ids[of_set & load_mask].ravel(), minlength=experts)
      f = experts * counts / counts.sum() if counts.any() else np.ones(experts)
      length = of_set.sum() if parts.all_positions else here.sum()
      mean = p_of_layer[here].sum(0) / length
      losses.append(f.reshape(-1, size).mean(1) @ mean.reshape(-1, size).sum(1))
      shares.append(float(here.sum()) ** parts.length_power)
    of_layers.append(np.average(losses, weights=shares) if losses else 0.0)
  return float(np.mean(of_layers))
