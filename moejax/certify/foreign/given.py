"""What a foreign function is given: batches of logits, and everything that a loss may look at.

  Case -> Given, as far as the function takes it

Letters: L layers, B batch, S sequence, D model, E experts, K experts per token.
"""

from typing import NamedTuple

import numpy as np

from moejax.certify.batches import WHOLE, B, Case, draw_cases
from moejax.certify.foreign.claim import Claim
from moejax.certify.oracle.routing import F64, I64, Bool, best, scores
from moejax.certify.oracle.selection import limited_to_groups

WIDTH = 6  # D, of the router's weights that SimBal looks at
# What is unusual about a batch -> the cases that are so.
KINDS = {
  'whole rows': ('plain', 'ties', 'equal', 'all to one', 'one unchosen'),
  'padded rows': ('padded',),
  'packed documents': ('packed',),
  'holes': ('holes', 'single'),
  'extreme logits': ('extreme',),
  'low scores': ('low',),
  'no token that counts': ('nothing',),
}
# A function that chooses by itself may choose any of equal scores.
TIED = ('ties', 'equal', 'extreme')


class Given(NamedTuple):
  """The inputs of one call, float64 for the oracle; a function has the floats in its own dtype."""

  logits: F64  # [L, B, S, E]
  expert_ids: I64  # [L, B, S, K]  what f counts, best first
  mask: Bool  # [B, S]  the tokens that count
  segment_ids: I64  # [B, S]  documents of a row, 1, 2, ...; 0 for padding
  bias: F64  # [L, E]  what the choice adds to the scores
  noise: F64  # [L, B, S, E]  added to logits before a noisy choice
  std: F64  # [L, B, S, E]  of that noise
  router: F64  # [D, E]  the weights that make the logits


def choose_experts(claim: Claim, logits: F64, bias: F64) -> I64:
  """The K experts of each token by score plus bias, within its best groups. [..., E] -> [..., K].

  Ties go to the lowest expert.
  """

  def of_token(choice: F64) -> I64:
    limited = limited_to_groups(choice, claim.num_groups, claim.top_groups, claim.group_best)
    return np.array(best(limited, claim.top_k))

  return np.apply_along_axis(of_token, -1, scores(logits, claim.score_fn) + bias)


def counts_unbiased_choice(claim: Claim) -> bool:
  """Whether f counts the best K scores, without bias and groups."""
  return claim.is_product and claim.assignment == 'unbiased' and claim.like != 'gshard'


def counted_experts(claim: Claim, logits: F64, bias: F64) -> I64:
  """The experts that f counts, [L, B, S, K] of logits [L, B, S, E] and bias [L, E]."""
  if counts_unbiased_choice(claim):
    return np.apply_along_axis(
      lambda s: np.array(best(s, claim.top_k)), -1, scores(logits, claim.score_fn)
    )
  return choose_experts(claim, logits, bias[:, None, None, :])


def rounded(values: np.ndarray, dtype: str) -> F64:
  """Values as the function's dtype has them, in float64."""
  return np.asarray(values, dtype).astype(np.float64)


def completed(
  claim: Claim, logits: F64, case: Case, bias: F64, rng: np.random.Generator, dtype: str
) -> Given:
  """A call with these logits [L, B, S, E] and bias [L, E], mask and segments those of a case."""
  logits, bias = rounded(logits, dtype), rounded(bias, dtype)
  std = rng.uniform(0.5, 1.5, logits.shape)
  needs_ids = claim.like in ('importance', 'router') or claim.is_product
  ids = np.zeros((*logits.shape[:-1], claim.top_k), np.int64)
  return Given(
    logits=logits,
    expert_ids=counted_experts(claim, logits, bias) if needs_ids else ids,
    mask=case.mask,
    segment_ids=case.segments.astype(np.int64),
    bias=bias,
    noise=rounded(rng.normal(size=logits.shape) * std, dtype),
    std=rounded(std, dtype),
    router=rounded(rng.normal(size=(WIDTH, claim.num_experts)), dtype),
  )


def asked_cases(claim: Claim, takes: frozenset[str]) -> dict[str, tuple[str, ...]]:
  """Of each kind the cases that make sense for a function that takes these."""
  skipped: set[str] = set()
  if 'expert_ids' not in takes and (claim.is_product or claim.like == 'importance'):
    skipped.update(TIED)
  if 'segment_ids' not in takes:
    skipped.add('packed')
  if 'mask' not in takes:
    skipped.update(KINDS['holes'])
  if not takes & {'mask', 'segment_ids'}:
    skipped.update(('padded', 'nothing'))
  kinds = {}
  for kind, labels in KINDS.items():
    if asked := tuple(label for label in labels if label not in skipped):
      kinds[kind] = asked
  return kinds


def as_taken(case: Case, kind: str, takes: frozenset[str]) -> Case:
  """A case with no more mask, segments and bias than the function is told of."""
  whole = kind == 'whole rows' or 'segment_ids' not in takes
  segments = WHOLE if whole else case.segments
  mask = WHOLE > 0 if kind == 'whole rows' else case.mask
  if 'mask' not in takes:
    # Segments tell what is padding; a function that has neither is given no padding.
    if kind == 'no token that counts':
      segments = np.zeros_like(WHOLE)
    mask = segments > 0
  return case._replace(mask=mask, segments=segments)


def make_given(
  claim: Claim, takes: frozenset[str], seed: int, dtype: str
) -> dict[str, dict[str, Given]]:
  """Every call that makes sense for a function that takes these: kind -> case -> inputs."""
  layers = range(max(1, claim.layers))
  drawn = [draw_cases(np.random.default_rng((seed, 1, i)), claim.num_experts) for i in layers]
  rng, kinds = np.random.default_rng((seed, 2)), {}
  for kind, labels in asked_cases(claim, takes).items():
    kinds[kind] = {}
    for label in labels:
      logits = np.stack([cases[label].logits for cases in drawn])
      bias = np.stack([cases[label].bias for cases in drawn])
      if not takes & {'bias', 'expert_ids'}:
        bias = np.zeros_like(bias)
      case = as_taken(drawn[0][label], kind, takes)
      kinds[kind][label] = completed(claim, logits, case, bias, rng=rng, dtype=dtype)
  return kinds


def even_given(claim: Claim, seed: int, dtype: str, label: str) -> Given:
  """A batch [L, B, E, E] whose tokens, one after another, take each expert equally often.

  label: 'even' logits, or 'uneven', which choose the same experts.
  """
  experts, layers = claim.num_experts, max(1, claim.layers)
  rng = np.random.default_rng((seed, 3))
  ahead = (np.arange(experts) - np.arange(experts)[:, None]) % experts
  logits = np.broadcast_to(np.maximum(6 - 0.5 * ahead, 0), (layers, B, experts, experts))
  if label == 'uneven':
    # Less than half of the distance between neighbours: nobody changes places.
    logits = logits + rng.uniform(-0.2, 0.2, logits.shape)
  ones = np.ones((B, experts), np.int64)
  case = Case(logits[0], np.zeros(experts), ones > 0, ones)
  given = completed(claim, logits, case, np.zeros((layers, experts)), rng=rng, dtype=dtype)
  place = (np.arange(experts)[:, None] + np.arange(claim.top_k)) % experts
  ids = np.broadcast_to(place, given.expert_ids.shape).copy()
  orthogonal = np.eye(experts)
  return given._replace(
    expert_ids=ids, noise=np.zeros_like(logits), std=np.ones_like(logits), router=orthogonal
  )
