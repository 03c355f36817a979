"""What an author claims of a function that is to be certified: the equation, and its numbers.

Letters: E experts, K experts per token, M groups of experts.
"""

import dataclasses
import math
from typing import NamedTuple

from moejax.certify.oracle.routing import SCORES
from moejax.config import above_zero, at_least, check, not_finite, not_one_of, problem_if, unknown

ROUTER = 'router'
COUNTED = ('dispatched', 'unbiased')
WEIGHED = ('scores', 'softmax')


class Equation(NamedTuple):
  """An equation that a loss may be like."""

  balanced: float  # its value at perfect balance; NaN where that depends on the logits
  subject: str = 'logits'  # what the loss has a gradient to
  is_product: bool = False  # f times P, with sets of tokens


# Every row of moejax's BALANCE_LOSSES; the values at balance are those of docs/balance.md.
EQUATIONS: dict[str, Equation] = {
  'ep_group': Equation(1.0, is_product=True),
  'global_batch': Equation(1.0, is_product=True),
  'gshard': Equation(1.0, is_product=True),
  'importance': Equation(0.0),
  'load': Equation(0.0),
  'micro_batch': Equation(1.0, is_product=True),
  'router_z': Equation(math.nan),
  'sequence': Equation(1.0, is_product=True),
  'simbal': Equation(0.0, subject='router'),
}


@dataclasses.dataclass(frozen=True)
class Claim:
  """What the function computes: the value of `like`, times `factor`.

  like: a row of BALANCE_LOSSES, or 'router' for a function that chooses and weighs experts.
  num_experts, top_k: of the batches that the function is given.
  score_fn: 'softmax', 'sigmoid' or 'sqrt_softplus' of the logits; P is it over its sum.
  num_groups, top_groups, group_best: the choice is limited to the experts of the `top_groups` best
    groups, a group being worth the sum of its `group_best` best entries.
  renormalise, weigh, scale: of a router's weights: chosen scores over their sum; 'softmax' of the
    chosen logits in place of 'scores'; a factor.
  assignment: what f counts: 'unbiased', the best K scores (DeepSeek-V3 eq. 18), or 'dispatched',
    the choice with bias and groups.
  partition: groups of experts that are balanced (`Scope`); 0 for single experts.
  probability: what P is made of, where that is not `score_fn`.
  row_sets: into how many runs of rows the batch of four is cut, each a set, for micro_batch,
    ep_group and gshard; 1: a call is one set.
  layers: 0 for a function of one layer. With L >= 1 logits are [L, B, S, E], and so on.
  pooled: f and P are over the tokens of all layers, and not a mean of the layers' losses.
  factor: a documented constant, such as K for transformers and MaxText, L for Megatron (which adds
    layers up), L/K for Levanter: the table of `moejax.moe.balance.losses`.
  """

  like: str = 'sequence'
  num_experts: int = 8
  top_k: int = 2
  score_fn: str = 'softmax'
  num_groups: int = 1
  top_groups: int = 1
  group_best: int = 2
  renormalise: bool = True
  weigh: str = 'scores'
  scale: float = 1.0
  assignment: str = 'unbiased'
  partition: int = 0
  probability: str = ''
  row_sets: int = 1
  layers: int = 0
  pooled: bool = False
  factor: float = 1.0

  def __post_init__(self) -> None:
    check(
      not_one_of('like', self.like, (*EQUATIONS, ROUTER)),
      not_one_of('score_fn', self.score_fn, SCORES),
      not_one_of('assignment', self.assignment, COUNTED),
      not_one_of('weigh', self.weigh, WEIGHED),
      problem_if(
        self.probability and self.probability not in SCORES,
        f"probability={self.probability!r}: use '' (that of score_fn) or one of {sorted(SCORES)}",
      ),
      *not_finite(self),
    )
    check(*self._size_problems(), *above_zero(self, 'scale'), *self._meaningless())

  def _size_problems(self) -> list[str]:
    """What is wrong with the whole numbers, '' for each that is right."""
    experts, groups = self.num_experts, max(1, self.num_groups)
    reachable = experts // groups * self.top_groups
    return [
      *at_least(2, self, 'num_experts', meaning='one expert is always balanced'),
      *at_least(1, self, 'group_best'),
      *at_least(0, self, 'layers'),
      problem_if(
        not 1 <= self.top_k < experts,
        f'top_k={self.top_k}: use 1 to {experts - 1}, below num_experts={experts}',
      ),
      problem_if(
        self.num_groups < 1 or experts % groups,
        f'num_groups={self.num_groups}: use a divisor of num_experts={experts}',
      ),
      problem_if(
        not 1 <= self.top_groups <= groups or self.top_k > reachable,
        f'top_groups={self.top_groups}: use up to num_groups={self.num_groups}, with room for '
        f'top_k={self.top_k} experts',
      ),
      problem_if(
        self.partition < 0 or self.partition == 1 or (self.partition and experts % self.partition),
        f'partition={self.partition}: use 0 (single experts), or a divisor of num_experts={experts}'
        ' above 1',
      ),
      problem_if(
        self.row_sets not in (1, 2, 4), f'row_sets={self.row_sets}: use 1, 2 or 4: there are 4 rows'
      ),
      problem_if(self.factor == 0, f'factor={self.factor}: use a number that is not 0'),
    ]

  def _meaningless(self) -> list[str]:
    """A problem for each field that `like` does not look at, and that was given."""
    of_products = ('partition', 'probability', 'pooled')
    if self.is_product:
      ignored = () if self.like in ('micro_batch', 'ep_group', 'gshard') else ('row_sets',)
    else:
      ignored = (*of_products, 'row_sets')
    if self.like == ROUTER:
      ignored = (*ignored, 'factor', 'layers')
    usual = {field.name: field.default for field in dataclasses.fields(self)}
    given = {name: getattr(self, name) for name in ignored}
    problems = [
      f'{name}={value!r} says nothing of like={self.like!r}: leave it out'
      for name, value in given.items()
      if value != usual[name]
    ]
    pooled_problem = 'pooled=True needs several layers: use layers=2 or more'
    return [*problems, problem_if(self.pooled and self.layers < 2, pooled_problem)]

  @property
  def equation(self) -> Equation:
    """The equation that the loss is like; a router has none."""
    return EQUATIONS[self.like]

  @property
  def is_product(self) -> bool:
    """Whether it is a loss f times P."""
    return self.like in EQUATIONS and self.equation.is_product

  def text(self) -> str:
    """The claim as arguments, those left out that are as usual."""
    fields = [field for field in dataclasses.fields(self) if field.name != 'like']
    changed = [
      f'{field.name}={getattr(self, field.name)!r}'
      for field in fields
      if getattr(self, field.name) != field.default
    ]
    return ', '.join([f'like={self.like!r}', *changed])


def make_claim(like: str, fields: dict[str, object]) -> Claim:
  """The claim of keyword arguments.

  Raises:
    ConfigError: a field that there is not, or a value of another type.
  """
  known = {field.name: field for field in dataclasses.fields(Claim)}
  check(*(unknown(name, known) for name in fields if name not in known))
  given = {'like': like, **fields}
  problems = []
  for name, value in given.items():
    wanted = known[name].type
    is_number = wanted is float and type(value) in (int, float)
    if type(value) is not wanted and not is_number:
      problems.append(f'{name}={value!r}: use a value of type {wanted.__name__}')
  check(*problems)
  return Claim(**given)
