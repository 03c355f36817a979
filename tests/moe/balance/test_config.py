"""The config of load balance: what it refuses, and the scopes that it makes."""

import pytest

from moejax.config import ConfigError, frozendict
from moejax.moe.balance.config import ACCUMULATIONS, BalanceConfig, router_problems
from moejax.moe.balance.losses import (
  spans_micro_batches,
)
from moejax.moe.routing import RouterConfig
from moejax.moe.token_sets import Scope


# What does not fit.
def test_config_names_every_problem_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    BalanceConfig(
      frozendict({'sequences': '0.1', 'sequence': '0.1@', 'importance': 0.1}),
      'signs',
      'fast',
      0,
      -1,
      'biased',
      'tanh',
      'approximate',
    )
  want = (
    'losses.sequences is not a balance loss: use one of',
    "losses.sequence='0.1@' is not a schedule: use",
    "bias_rule='signs' is not one of",
    "bias_rate='fast' is not a schedule: use",
    'ep_groups=0: use 1 or more',
    'partition=-1: use 0',
    "probability='tanh' is not one of ['sigmoid', ",
    "assignment='biased' is not one of [",
    f"accumulation='approximate' is not one of {sorted(ACCUMULATIONS)}",
    "accumulation='approximate' is for losses that are linear in P, "
    "not losses.importance: use 'exact'",
  )
  assert len(error.value.problems) == len(want)
  for problem, begin in zip(error.value.problems, want, strict=True):
    assert problem.startswith(begin), problem


def test_one_group_is_always_even_and_so_no_partition() -> None:
  with pytest.raises(ConfigError, match='partition=1: use 0 .*one group is always even'):
    BalanceConfig(partition=1)


def test_std_of_share_cannot_train_and_says_why() -> None:
  with pytest.raises(
    ConfigError, match='losses.std_of_share is not a balance loss: .*made of counts, it has no grad'
  ):
    BalanceConfig(frozendict(std_of_share='0.1'))
  with pytest.raises(ConfigError) as error:
    BalanceConfig(frozendict(std_of_shares='0.1'))
  assert 'made of counts' not in str(error.value)


TOP_K, HASH = RouterConfig(8, 2), RouterConfig(8, 2, selection='hash')


GROUPED = RouterConfig(8, 2, num_groups=4, top_groups=2)


NOISY = RouterConfig(8, 2, noisy=True)


SPREAD = frozendict(global_batch='0.1')


MISFITS = {
  'bias ignored': (
    BalanceConfig(bias_rule='sign'),
    HASH,
    1,
    "balance.bias_rule='sign' would move a bias that selection='hash' ignores: "
    "use selection='top_k'",
  ),
  'no expert left': (
    BalanceConfig(bias_rule='quantile'),
    RouterConfig(8, 8),
    1,
    "balance.bias_rule='quantile' needs an expert that is not chosen: "
    'use top_k below num_experts=8',
  ),
  'no noise': (
    BalanceConfig(frozendict(load='0.1')),
    TOP_K,
    1,
    'balance.losses.load is the load that noise may give: '
    'use router.noisy=True, or the loss importance',
  ),
  'noise and bias': (
    BalanceConfig(frozendict(load='0.1'), 'sign'),
    NOISY,
    1,
    "balance.losses.load does not know of a bias: use bias_rule='' instead of 'sign'",
  ),
  'partition': (
    BalanceConfig(partition=3),
    TOP_K,
    1,
    'balance.partition=3 does not divide num_experts=8: use a divisor of it',
  ),
  'lagged': (
    BalanceConfig(SPREAD, accumulation='lagged'),
    TOP_K,
    1,
    "balance.accumulation='lagged' is about several micro-batches: "
    "use micro_batches above 1, or 'exact'",
  ),
  'buffer': (
    BalanceConfig(SPREAD, accumulation='buffer'),
    TOP_K,
    1,
    "balance.accumulation='buffer' is about several micro-batches: "
    "use micro_batches above 1, or 'exact'",
  ),
}


@pytest.mark.parametrize('name', MISFITS)
def test_what_a_router_cannot_serve_is_told_with_its_remedy(name: str) -> None:
  balance, of, micro_batches, told = MISFITS[name]
  problems = [problem for problem in router_problems(balance, of, micro_batches) if problem]
  assert len(problems) == 1 and problems[0].startswith(told), problems


def test_what_fits_is_not_complained_about() -> None:
  for fits in (
    (BalanceConfig(bias_rule='sign'), GROUPED, 1),
    (BalanceConfig(bias_rule='quantile'), GROUPED, 1),
    (BalanceConfig(frozendict(load='0.1')), NOISY, 1),
    (BalanceConfig(partition=4), TOP_K, 1),
    (BalanceConfig(SPREAD, accumulation='lagged'), TOP_K, 2),
    (BalanceConfig(SPREAD), HASH, 1),
    (
      BalanceConfig(frozendict(importance='1', gshard='1'), assignment='first'),
      RouterConfig(8, 1, renormalise=False),
      1,
    ),
    (BalanceConfig(frozendict(importance='1')), RouterConfig(8, 1, selection='expert_choice'), 1),
  ):
    assert not any(router_problems(*fits)), fits
  assert len({text for text in map(str, router_problems(BalanceConfig(), TOP_K, 1)) if text}) == 0


def test_scopes_are_of_the_active_losses() -> None:
  losses = frozendict(
    {'ep_group': '0.1', 'micro_batch': 0.01, 'sequence': '0', 'router_z': 0.0, 'gshard': '0, 1@50%'}
  )
  cfg = BalanceConfig(
    losses, ep_groups=2, partition=4, assignment='dispatched', probability='sigmoid'
  )
  scopes = cfg.scopes(batch_size=8, micro_batches=4)
  assert scopes == {
    name: Scope(rows, 4, 'dispatched', 'sigmoid')
    for name, rows in (('ep_group', 4), ('micro_batch', 2), ('gshard', 2))
  }
  assert spans_micro_batches(scopes, 2) == ('ep_group',) and hash(cfg) == hash(
    BalanceConfig(losses, '', '0.001', 2, 4, 'dispatched', 'sigmoid')
  )
  buffered = BalanceConfig(losses, ep_groups=2, accumulation='buffer').scopes(8, 4)
  assert buffered['ep_group'] == Scope(4, running=True)
