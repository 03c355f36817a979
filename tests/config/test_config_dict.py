"""Config: the round trip, and every problem of a tree in one message, by its full path."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from moejax.config import ConfigError, check, from_config_dict, frozendict, to_config_dict
from moejax.data.sources import DataConfig
from moejax.model.config import ModelConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Router:
  num_experts: int = 8
  top_k: int = 2
  scale: float = 1.0

  def __post_init__(self) -> None:
    over = self.top_k > self.num_experts
    check(f'top_k={self.top_k} is more than num_experts={self.num_experts}' if over else '')


@dataclasses.dataclass(frozen=True)
class Model:
  d_model: int = 64
  num_heads: int = 4
  tied: bool = False
  name: str = 'tiny'
  betas: tuple[float, float] = (0.9, 0.95)
  layers: tuple[int, ...] = ()
  router: Router = Router()

  def __post_init__(self) -> None:
    uneven = self.num_heads < 1 or self.d_model % self.num_heads
    check(f'd_model={self.d_model} does not divide by num_heads={self.num_heads}' if uneven else '')


@dataclasses.dataclass(frozen=True)
class Root:
  steps: int = 10
  model: Model = Model()
  losses: frozendict = dataclasses.field(default_factory=lambda: frozendict(sequence=0.01))

  def __post_init__(self) -> None:
    check('' if self.steps > 0 else f'steps={self.steps} is not positive')


def problems_of(d: dict) -> tuple[str, ...]:
  with pytest.raises(ConfigError) as caught:
    from_config_dict(Root, d)
  assert str(caught.value) == '\n'.join(caught.value.problems)
  return caught.value.problems


def test_round_trip_keeps_every_value_and_type() -> None:
  root = Root(
    7, Model(128, 8, True, 'x', (0.8, 0.9), (1, 2), Router(4, 1, 2.5)), frozendict(a=1.0, b='0.1@0')
  )
  d = to_config_dict(root)
  assert from_config_dict(Root, d) == root
  assert from_config_dict(Root, d.to_dict()) == root  # and from plain dicts, as JSON gives them
  assert hash(from_config_dict(Root, d)) == hash(root)
  assert from_config_dict(Root, {}) == Root()


def test_json_lists_become_tuples_and_ints_become_floats() -> None:
  root = from_config_dict(
    Root, {'model': {'betas': [1, 0.5], 'router': {'scale': 2}}, 'losses': {'z': 1}}
  )
  assert root.model.betas == (1.0, 0.5) and type(root.model.betas[0]) is float
  assert type(root.model.router.scale) is float and type(root.losses['z']) is float


def test_config_dict_is_locked_but_for_its_tables() -> None:
  d = to_config_dict(Root())
  with pytest.raises(AttributeError, match='d_model'):
    d.model.d_modle = 3
  with pytest.raises(TypeError):
    d.steps = 'three'
  d.losses.router_z = 0.001
  d.losses.sequence = '0.1@0'
  assert from_config_dict(Root, d).losses == {'sequence': '0.1@0', 'router_z': 0.001}


def test_all_problems_come_in_one_message() -> None:
  d = {
    'steps': 0,
    'stepz': 1,
    'model': {
      'num_head': 3,
      'num_heads': 7,
      'tied': 1,
      'd_model': True,
      'betas': (0.9,),
      'layers': (1, 'b'),
      'router': {'top_k': 9, 'scale': '1'},
    },
    'losses': {'sequence': [1], 'ok': 0.1},
  }
  assert problems_of(d) == (
    'config.stepz: no such field; did you mean steps?',
    'config.model.num_head: no such field; did you mean num_heads?',
    'config.model.d_model=True is bool; give int',
    'config.model.tied=1 is int; give bool',
    'config.model.betas=(0.9,) is tuple; give tuple[float, float]',
    "config.model.layers[1]='b' is str; give int",
    "config.model.router.scale='1' is str; give float",
    'config.model.router: top_k=9 is more than num_experts=8',
    'config.model: d_model=64 does not divide by num_heads=7',
    'config.losses.sequence=[1] is list; give float',
    'config: steps=0 is not positive',
  )


@pytest.mark.parametrize('bad', [None, 3, 'x', [1]])
def test_a_section_that_is_no_table_is_a_wrong_type(bad: object) -> None:
  assert problems_of({'model': bad}) == (
    f'config.model={bad!r} is {type(bad).__name__}; give Model',
  )


def test_a_name_far_from_all_lists_them() -> None:
  assert problems_of({'model': {'router': {'qqq': 1}}}) == (
    'config.model.router.qqq: no such field; did you mean num_experts or scale or top_k?',
  )


def test_check_ignores_what_is_empty_and_keeps_the_rest() -> None:
  check('', '')
  with pytest.raises(ConfigError) as caught:
    check('', 'one', '', 'two')
  assert caught.value.problems == ('one', 'two')


def test_frozendict_hashes_by_value_copies_and_does_not_change() -> None:
  a, b = frozendict(x=1.0, y='z'), frozendict(y='z', x=1.0)
  assert hash(a) == hash(b) and a == b and hash(a) != hash(frozendict(x=1.0, y='w'))
  assert copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == a
  for change in (lambda: a.update(x=2), lambda: a.pop('x'), lambda: a.__setitem__('x', 2), a.clear):
    with pytest.raises(TypeError, match='frozen'):
      change()


def test_config_needs_no_jax_and_no_model() -> None:
  code = 'import sys, moejax.config; sys.exit("jax" in sys.modules or "moejax.moe" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_config_dict_survives_deepcopy_with_its_locks() -> None:
  d = copy.deepcopy(to_config_dict(Root()))
  assert (
    isinstance(d, ConfigDict)
    and d.is_locked
    and d.model.router.is_locked
    and not d.losses.is_locked
  )


# The real tree, for what its balance can be and what does not fit together.


def test_an_experiment_comes_back_with_every_switch_of_its_balance() -> None:
  cfg = ExperimentConfig(
    micro_batches=2,
    model=ModelConfig(moe=MoEConfig(RouterConfig(8, 2, noisy=True, jitter=0.1, group_best=1))),
    data=DataConfig(source='mixture', mixture=frozendict(code='0.7 stdlib', prose='0.3 synthetic')),
    balance=BalanceConfig(
      frozendict(global_batch='0.1, 0.01@10%', ep_group=0.5),
      'smebu',
      '0.001, 0@90%',
      4,
      2,
      'dispatched',
      'sigmoid',
      'lagged',
    ),
  )
  assert from_config_dict(ExperimentConfig, to_config_dict(cfg).to_dict()) == cfg
  assert set(to_config_dict(ExperimentConfig()).balance.losses) == set(BALANCE_LOSSES), (
    'any can be switched on'
  )


def problems_of_experiment(changes: dict) -> tuple[str, ...]:
  with pytest.raises(ConfigError) as caught:
    from_config_dict(ExperimentConfig, changes)
  return caught.value.problems


def router_of(**fields: object) -> dict:
  return {'model': {'moe': {'router': fields}}}


IMPOSSIBLE = {
  'a bias that the router ignores': (
    router_of(selection='hash') | {'balance': {'bias_rule': 'sign'}},
    "config: balance.bias_rule='sign' would move a bias that selection='hash' ignores: "
    "use selection='top_k'",
  ),
  'groups that do not divide': (
    router_of(num_experts=8, num_groups=3),
    'config.model.moe.router: num_groups=3 does not divide num_experts=8: use a divisor of it',
  ),
  'more experts than the groups hold': (
    router_of(num_experts=8, num_groups=4, top_groups=1, top_k=4),
    'config.model.moe.router: top_k=4 is more than the 2 experts of top_groups=1 groups: '
    'raise top_groups or lower',
  ),
  'a partition that does not divide': (
    router_of(num_experts=8) | {'balance': {'partition': 3}},
    'config: balance.partition=3 does not divide num_experts=8: use a divisor of it',
  ),
  'accumulation of one micro-batch': (
    {'balance': {'accumulation': 'buffer'}},
    "config: balance.accumulation='buffer' is about several micro-batches: "
    "use micro_batches above 1, or 'exact'",
  ),
  'more micro-batches than rows': (
    {'batch_size': 4, 'micro_batches': 8, 'balance': {'losses': {'global_batch': '0.1'}}},
    'config: micro_batches=8 does not divide batch_size=4: use a divisor of it',
  ),
  'groups of rows that are neither parts nor wholes of micro-batches': (
    {
      'batch_size': 12,
      'micro_batches': 3,
      'balance': {'losses': {'ep_group': '0.1'}, 'ep_groups': 2},
    },
    'config: balance.ep_groups=2: use a divisor of batch_size=12 that divides, or is a multiple '
    'of, micro_batches=3',
  ),
  'a loss that cannot train': (
    {'balance': {'losses': {'std_of_share': '0.1'}}},
    'config.balance: losses.std_of_share is not a balance loss: use one of ',
  ),
  'a seed of more than 32 bits': (
    {'seed': 2**63},
    'config: seed=9223372036854775808: use 4294967295 at most',
  ),
  'more steps than int32 counts': (
    {'steps': 2**31},
    'config.steps=2147483648: use 2147483647 at most',
  ),
  'a width of more than int32 holds': (
    {'model': {'d_model': 10**400}},
    'config.model.d_model=1000',
  ),
  'a prompt that is not UTF-8': (
    {'sample_prompt': 'ab\udcff'},
    "config: sample_prompt='ab\\udcff' is not UTF-8: give text in UTF-8",
  ),
  'a weight for no task': (
    {'loss': {'task_weights': {'code': 2.0}}},
    'config: loss.task_weights.code is not a task of data: use one of ',
  ),
}


@pytest.mark.parametrize('name', IMPOSSIBLE)
def test_what_does_not_fit_is_one_clear_error(name: str) -> None:
  changes, told = IMPOSSIBLE[name]
  problems = problems_of_experiment(changes)
  assert len(problems) == 1 and problems[0].startswith(told), problems


def test_all_that_does_not_fit_is_told_at_once() -> None:
  problems = problems_of_experiment(
    router_of(selection='hash', num_groups=2)
    | {
      'micro_batches': 3,
      'balance': {'bias_rule': 'sign', 'partition': 3, 'accumulation': 'buffer', 'ep_groups': 0},
    }
  )
  for told in (
    'num_groups=2 is about a choice',
    'micro_batches=3 does not divide',
    'ep_groups=0: use 1 or more',
  ):
    assert any(told in problem for problem in problems), (told, problems)
