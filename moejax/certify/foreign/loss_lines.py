"""What is asked of a foreign balance loss: its lines, each a promise and its checks.

  Given -> the function | the oracle -> values side by side
        -> its gradient, or its differences | differences of the oracle

Letters: L layers, B batch, S sequence, D model, E experts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moejax.certify.checks import Check, Worst
from moejax.certify.foreign.call import Foreign, value_or_nan
from moejax.certify.foreign.claim import Claim
from moejax.certify.foreign.diagnosis import Sample, explain, relative_distance
from moejax.certify.foreign.equation import promised
from moejax.certify.foreign.given import (
  Given,
  counted_experts,
  counts_unbiased_choice,
  even_given,
  make_given,
)


class Tolerance(NamedTuple):
  """The largest deviations that pass, for floats of one kind, and why."""

  value: float
  value_why: str
  gradient: float
  gradient_why: str


TOLERANCES = {
  'float32': Tolerance(
    value=2e-6,
    value_why='relative; 16 roundings of float32',
    gradient=1e-5,
    gradient_why='of its norm; float32 against differences of float64',
  ),
  'float64': Tolerance(
    value=1e-10,
    value_why='relative; float64 has 1e-12 of logits of 1e4',
    gradient=1e-7,
    gradient_why='of its norm; differences of float64 err by 1e-9 of it',
  ),
}


class Asked(NamedTuple):
  """A function, and all the batches that it is asked about."""

  foreign: Foreign
  kinds: dict[str, dict[str, Given]]
  seed: int
  samples: list[Sample]  # every value that was compared so far

  @property
  def claim(self) -> Claim:
    """What the function is claimed to compute."""
    return self.foreign.claim

  @property
  def tolerance(self) -> Tolerance:
    """The tolerances for the floats that the function is given."""
    return TOLERANCES[self.foreign.dtype]


def ask(foreign: Foreign, seed: int) -> Asked:
  """The batches for a function, which has been called on a plain one.

  Raises:
    ConfigError: the function raises, or returns something else than is asked for.
  """
  kinds = make_given(foreign.claim, foreign.takes, seed, foreign.dtype)
  foreign.probe(kinds['whole rows']['plain'])
  return Asked(foreign, kinds, seed, [])


def see_value(asked: Asked, worst: Worst, where: str, given: Given, wanted: float) -> None:
  """Takes in one value, and keeps it for the diagnosis."""
  returned, raised = value_or_nan(asked.foreign, given)
  asked.samples.append(Sample(where, given, returned.value, wanted))
  said = raised or f'{returned.value:.7g} for {wanted:.7g}'
  worst.see(f'{where}: {said}', relative_distance(asked.claim, returned.value, wanted))


def value_checks(asked: Asked) -> Iterator[Check]:
  """Checks the value, for each kind of batch."""
  for kind, cases in asked.kinds.items():
    worst = Worst(f'value, {kind}', asked.tolerance.value, asked.tolerance.value_why)
    for label, given in cases.items():
      see_value(asked, worst, label, given, promised(asked.claim, given))
    yield worst.check()


def balanced_checks(asked: Asked) -> Iterator[Check]:
  """Checks the value at perfect balance, whatever the probabilities are."""
  claim = asked.claim
  worst = Worst('value at perfect balance', asked.tolerance.value, asked.tolerance.value_why)
  for label in even_labels(asked):
    given = even_given(claim, asked.seed, asked.foreign.dtype, label)
    see_value(asked, worst, f'{label} logits', given, claim.factor * claim.equation.balanced)
  yield worst.check()


def even_labels(asked: Asked) -> tuple[str, ...]:
  """The batches at which the claim's value at perfect balance is known."""
  claim = asked.claim
  if math.isnan(claim.equation.balanced):
    return ()
  if not claim.is_product:
    return ('even',)
  if 'expert_ids' in asked.foreign.takes:
    return ('even', 'uneven')
  # A choice of its own, within groups, is not even on these logits.
  given = even_given(claim, asked.seed, asked.foreign.dtype, 'even')
  ids = counted_experts(claim, given.logits, np.zeros_like(given.bias))
  counts = np.bincount(ids.ravel(), minlength=claim.num_experts)
  return ('even', 'uneven') if counts.min() == counts.max() else ()


def garbage_checks(asked: Asked) -> Iterator[Check]:
  """Checks that logits and experts of tokens that do not count change nothing."""
  worst = Worst('garbage in what does not count', asked.tolerance.value, asked.tolerance.value_why)
  rng, claim = np.random.default_rng((asked.seed, 4)), asked.claim
  for kind in ('padded rows', 'holes'):
    for label, given in asked.kinds[kind].items() if kind in asked.kinds else ():
      garbage = rng.choice([-1e4, -30.0, 30.0, 1e4], given.logits.shape)
      counts = given.mask[None, ..., None]
      ids = rng.permuted(np.broadcast_to(np.arange(claim.num_experts), garbage.shape), axis=-1)
      spoilt = given._replace(
        logits=np.where(counts, given.logits, garbage),
        expert_ids=np.where(counts, given.expert_ids, ids[..., : claim.top_k]),
      )
      see_value(asked, worst, f'{label}, garbage', spoilt, promised(claim, given))
  yield worst.check()


def shrunk_checks(asked: Asked) -> Iterator[Check]:
  """Checks that an even load has its balanced value however small the scores are."""
  worst = Worst('an even load, whatever the scores', asked.tolerance.value, 'relative; P sums to 1')
  claim, dtype = asked.claim, asked.foreign.dtype
  given = even_given(claim, asked.seed, dtype, 'uneven')
  changed = {
    'less 15': given.logits - 15,
    'less 30': given.logits - 30,
    'less 60': given.logits - 60,
    'times 0.1': 0.1 * given.logits,
  }
  if 'expert_ids' in asked.foreign.takes:
    # Scores that all round to the same leave a function that chooses by itself no choice.
    changed |= {'less 1e4': given.logits - 1e4, 'plus 50': given.logits + 50}
  for label, logits in changed.items():
    logits = logits.astype(dtype).astype(np.float64)
    shrunk = given._replace(logits=logits)
    see_value(asked, worst, f'even load, logits {label}', shrunk, claim.factor)
  yield worst.check()


def biased_checks(asked: Asked) -> Iterator[Check]:
  """Checks that a bias that is large changes nothing where the choice is held."""
  worst = Worst('a bias in P', asked.tolerance.value, asked.tolerance.value_why)
  claim, rng = asked.claim, np.random.default_rng((asked.seed, 5))
  for label in ('plain', 'one unchosen'):
    given = asked.kinds['whole rows'][label]
    # The same for all experts, so that the choice stands, and a drawn one where ids are given.
    biases = {'even bias': np.full_like(given.bias, 0.25)}
    if 'expert_ids' in asked.foreign.takes or counts_unbiased_choice(claim):
      biases['drawn bias'] = rng.normal(size=given.bias.shape).astype(np.float32)
    for name, bias in biases.items():
      biased = given._replace(bias=bias.astype(np.float64))
      see_value(asked, worst, f'{label}, {name}', biased, promised(claim, given))
  yield worst.check()


def diagnosis(asked: Asked) -> list[str]:
  """What explains the values that were off, nothing where none was."""
  return explain(asked.claim, asked.samples, asked.tolerance.value)
