"""The config of load balance: which losses and which bias rule, and what a router can serve."""

import dataclasses

from moejax.config import check, frozendict
from moejax.config.schedule import schedule_problem
from moejax.moe.balance.aux_loss import ASSIGNMENTS
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BIAS_RULES
from moejax.moe.routing import SCORE_FNS, RouterConfig
from moejax.moe.selection import SELECTIONS
from moejax.moe.token_sets import Scope

ACCUMULATIONS = ('exact', 'lagged', 'buffer')


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Which losses and which bias rule keep the experts even.

  losses: name -> coefficient: a number, or a schedule such as '0.1, 0.01@10%, 0.001@70%' (openPangu's recipe). 0: off.
  bias_rule: a row of BIAS_RULES; '' for none.  bias_rate: its step, a number or a schedule.
  ep_groups: into how many expert-parallel groups of rows `ep_group` cuts the global batch.
  partition, assignment, probability: switches of the losses that are f times P; see `Scope`.
  accumulation: where f comes from when a set is spread over micro-batches: 'exact', a forward pass that only counts;
    'lagged', the step before; 'buffer', the micro-batches so far. The last two save that pass and are not the paper's.
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
    every = {name: '0' for name in BALANCE_LOSSES} | {
      name: str(value) for name, value in self.losses.items()
    }
    object.__setattr__(self, 'losses', frozendict(every))
    inexact = [
      name for name in self.active() if name in BALANCE_LOSSES and not BALANCE_LOSSES[name].linear
    ]
    check(
      *(
        f'losses.{name} is not a balance loss: use one of {sorted(BALANCE_LOSSES)}'
        + (
          '; made of counts, it has no gradient, and is logged as it is'
          if name == 'std_of_share'
          else ''
        )
        for name in self.losses
        if name not in BALANCE_LOSSES
      ),
      *(schedule_problem(f'losses.{name}', value) for name, value in self.losses.items()),
      f"bias_rule={self.bias_rule!r} is not one of {sorted(BIAS_RULES)}: use one of them, or '' for none"
      if self.bias_rule and self.bias_rule not in BIAS_RULES
      else '',
      schedule_problem('bias_rate', self.bias_rate),
      f'ep_groups={self.ep_groups}: use 1 or more' if self.ep_groups < 1 else '',
      f'partition={self.partition}: use 0 (single experts), or 2 groups or more: one group is always even'
      if self.partition < 0 or self.partition == 1
      else '',
      f"probability={self.probability!r} is not one of {sorted(SCORE_FNS)}: use one of them, or '' for the router's"
      if self.probability and self.probability not in SCORE_FNS
      else '',
      *(
        f'{name}={value!r} is not one of {sorted(rows)}'
        for name, value, rows in (
          ('assignment', self.assignment, ASSIGNMENTS),
          ('accumulation', self.accumulation, ACCUMULATIONS),
        )
        if value not in rows
      ),
      f"accumulation={self.accumulation!r} is for losses that are linear in P, not losses.{inexact[0]}: use 'exact'"
      if inexact and self.accumulation != 'exact'
      else '',
    )

  def active(self) -> tuple[str, ...]:
    """The losses that are not switched off, sorted."""
    return tuple(
      sorted(name for name, value in self.losses.items() if str(value) not in ('0', '0.0'))
    )

  def scopes(self, batch_size: int, micro_batches: int) -> frozendict:
    """Active loss -> its Scope in a step of `batch_size` rows."""
    sizes = {
      name: BALANCE_LOSSES[name].rows(batch_size, micro_batches, self.ep_groups)
      for name in self.active()
    }
    return frozendict(
      {
        name: Scope(
          rows, self.partition, self.assignment, self.probability, self.accumulation == 'buffer'
        )
        for name, rows in sizes.items()
      }
    )

  def groups_problem(self, batch_size: int, micro_batches: int) -> str:
    """What is wrong with `ep_groups` for a step of that size, '' if nothing."""
    groups, parts = self.ep_groups, max(1, micro_batches)
    if 'ep_group' not in self.active() or groups < 1:
      return ''
    if batch_size % groups or (groups % parts and parts % groups):
      return (
        f'balance.ep_groups={groups}: use a divisor of batch_size={batch_size} that divides, or is a '
        f'multiple of, micro_batches={micro_batches}'
      )
    return ''


def router_problems(
  balance: BalanceConfig, router: RouterConfig, micro_batches: int
) -> tuple[str, ...]:
  """What of a balance config a router cannot serve, '' for each thing that it can."""
  rule, selection = balance.bias_rule, router.selection
  experts, takes_bias = router.num_experts, SELECTIONS[selection].takes_bias
  return (
    f"balance.bias_rule={rule!r} would move a bias that selection={selection!r} ignores: use selection='top_k', or "
    "bias_rule=''"
    if rule and not takes_bias
    else '',
    f"balance.bias_rule='quantile' needs an expert that is not chosen: use top_k below num_experts={experts}"
    if rule == 'quantile' and router.top_k >= experts
    else '',
    'balance.losses.load is the load that noise may give: use router.noisy=True, or losses.importance'
    if 'load' in balance.active() and not router.noisy
    else '',
    f"balance.losses.load does not know of a bias: use bias_rule='' instead of {rule!r}"
    if 'load' in balance.active() and rule
    else '',
    'balance.losses.importance of weights that are always 1 has no gradient: use router.renormalise=False, or more '
    'than top_k=1'
    if 'importance' in balance.active() and takes_bias and router.renormalise and router.top_k == 1
    else '',
    f'balance.partition={balance.partition} does not divide num_experts={experts}: use a divisor of it'
    if balance.partition and experts % balance.partition
    else '',
    f'balance.accumulation={balance.accumulation!r} is about several micro-batches: use micro_batches above 1, or '
    "'exact'"
    if balance.accumulation != 'exact' and micro_batches == 1
    else '',
  )
