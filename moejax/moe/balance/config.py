"""The config of load balance: which losses and which bias rule, and what a router can serve."""

import dataclasses

from moejax.config import at_least, check, frozendict, not_one_of, problem_if
from moejax.config.schedule import schedule_problem
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.fit import fit_problems
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.token_sets import Scope

ACCUMULATIONS = ('exact', 'lagged', 'buffer')


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Which losses and which bias rule keep the experts even.

  losses: name -> coefficient: a number, or a schedule such as '0.1, 0.01@10%, 0.001@70%'
    (openPangu's recipe). 0: off.
  bias_rule: a row of BIAS_RULES; '' for none.
  bias_rate: the step of the bias rule, a number or a schedule.
  ep_groups: into how many expert-parallel groups of rows `ep_group` cuts the global batch.
  partition, assignment, probability: switches of the losses that are f times P; see `Scope`.
  accumulation: where f comes from when a set is spread over micro-batches: 'exact', a forward pass
    that only counts; 'lagged', the step before; 'buffer', the micro-batches so far. The last two
    save that pass and are not the paper's.
  """

  losses: frozendict = frozendict()
  bias_rule: str = ''
  bias_rate: str = '0.001'
  ep_groups: int = 1
  partition: int = 0
  assignment: str = 'unbiased'
  probability: str = ''
  accumulation: str = 'exact'

  def __post_init__(self) -> None:
    # Every row is there, as text, so that a flag can switch any of them on.
    losses = dict.fromkeys(BALANCE_LOSSES, '0')
    losses |= {name: str(value) for name, value in self.losses.items()}
    # The dataclass is frozen, and this is its constructor.
    object.__setattr__(self, 'losses', frozendict(losses))
    schedules = [schedule_problem(f'losses.{name}', value) for name, value in self.losses.items()]
    check(
      *(unknown_loss(name) for name in self.losses),
      *schedules,
      problem_if(
        self.bias_rule and self.bias_rule not in BIAS_RULES,
        f'bias_rule={self.bias_rule!r} is not one of {sorted(BIAS_RULES)}: use one of them, '
        "or '' for none",
      ),
      schedule_problem('bias_rate', self.bias_rate),
      *at_least(1, self, 'ep_groups'),
      problem_if(
        self.partition < 0 or self.partition == 1,
        f'partition={self.partition}: use 0 (single experts), or 2 groups or more: '
        'one group is always even',
      ),
      problem_if(
        self.probability and self.probability not in SCORE_FNS,
        f'probability={self.probability!r} is not one of {sorted(SCORE_FNS)}: use one of them, '
        "or '' for the router's",
      ),
      not_one_of('assignment', self.assignment, ASSIGNMENTS),
      not_one_of('accumulation', self.accumulation, ACCUMULATIONS),
      self._accumulation_problem(),
    )

  def _accumulation_problem(self) -> str:
    """What is wrong with `accumulation` for the active losses, '' if nothing."""
    if self.accumulation == 'exact':
      return ''
    for name in self.active():
      if name in BALANCE_LOSSES and not BALANCE_LOSSES[name].linear:
        return (
          f'accumulation={self.accumulation!r} is for losses that are linear in P, '
          f"not losses.{name}: use 'exact'"
        )
    return ''

  def active(self) -> tuple[str, ...]:
    """Returns the names of the losses that are not switched off, sorted."""
    names = [name for name, value in self.losses.items() if str(value) not in ('0', '0.0')]
    return tuple(sorted(names))

  def scopes(self, batch_size: int, micro_batches: int) -> frozendict:
    """Returns the Scope of each active loss in a step of `batch_size` rows."""
    scopes = {}
    for name in self.active():
      scopes[name] = Scope(
        rows=BALANCE_LOSSES[name].rows(batch_size, micro_batches, self.ep_groups),
        partition=self.partition,
        assignment=self.assignment,
        probability=self.probability,
        running=self.accumulation == 'buffer',
      )
    return frozendict(scopes)

  def groups_problem(self, batch_size: int, micro_batches: int) -> str:
    """What is wrong with `ep_groups` for a step of that size, '' if nothing."""
    groups, parts = self.ep_groups, max(1, micro_batches)
    if 'ep_group' not in self.active() or groups < 1:
      return ''
    # A group is several whole micro-batches or a part of one: it never begins in the middle of one
    # and ends in another.
    if batch_size % groups or (groups % parts and parts % groups):
      return (
        f'balance.ep_groups={groups}: use a divisor of batch_size={batch_size} that divides, or is '
        f'a multiple of, micro_batches={micro_batches}'
      )
    return ''


def unknown_loss(name: str) -> str:
  """What is wrong with the name of a balance loss, '' if nothing."""
  if name in BALANCE_LOSSES:
    return ''
  problem = f'losses.{name} is not a balance loss: use one of {sorted(BALANCE_LOSSES)}'
  # openPangu's measure of imbalance, which looks like a loss.
  if name == 'std_of_share':
    problem += '; made of counts, it has no gradient, and is logged as it is'
  return problem


def router_problems(
  balance: BalanceConfig, router: RouterConfig, micro_batches: int
) -> tuple[str, ...]:
  """Problems of a balance config with this router, '' for each that there is not."""
  partition, accumulation, experts = balance.partition, balance.accumulation, router.num_experts
  divides = not partition or experts % partition == 0
  scopes = {}
  for name in balance.active():
    # One problem for the partition, and not one for each loss; a loss that is not there is told by
    # the config of balance itself.
    if divides and name in BALANCE_LOSSES:
      scopes[name] = Scope(partition=partition, assignment=balance.assignment)
  return (
    *fit_problems(
      router, scopes, balance.bias_rule, loss='balance.losses.{}', rule='balance.bias_rule'
    ),
    problem_if(
      not divides,
      f'balance.partition={partition} does not divide num_experts={experts}: use a divisor of it',
    ),
    problem_if(
      accumulation != 'exact' and micro_batches == 1,
      f'balance.accumulation={accumulation!r} is about several micro-batches: '
      "use micro_batches above 1, or 'exact'",
    ),
  )
