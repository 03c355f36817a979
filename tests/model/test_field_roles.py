"""Every field of ModelConfig has one role, and the table names no field that is not there."""

from collections import Counter
from collections.abc import Mapping

import pytest

from moejax.config.fields import is_under, walk_fields
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.field_roles import FIELD_ROLES, fields_with_role
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig

FIELDS = [field.path for field in walk_fields(ModelConfig())]


def problems(roles: Mapping[str, tuple[str, ...]]) -> list[str]:
  """Fields that do not have exactly one role, and paths of the table that are not fields."""
  sections = [section for paths in roles.values() for section in paths]
  counts = Counter({path: 0 for path in FIELDS})
  counts.update(path for path in FIELDS for section in sections if is_under(path, [section]))
  wrong = [f'{path} has {count} roles' for path, count in counts.items() if count != 1]
  unknown = [section for section in sections if not any(is_under(p, [section]) for p in FIELDS)]
  return wrong + [f'{section} is no field' for section in unknown]


def test_every_field_has_exactly_one_role() -> None:
  assert len(FIELDS) > 50 and not problems(FIELD_ROLES)


@pytest.mark.parametrize('role', FIELD_ROLES)
def test_a_field_that_loses_its_role_is_noticed(role: str) -> None:
  first, *others = FIELD_ROLES[role]
  found = problems({**FIELD_ROLES, role: tuple(others)})
  assert found and all(problem.endswith(' has 0 roles') for problem in found)
  assert {problem.split()[0] for problem in found} == {p for p in FIELDS if is_under(p, [first])}


def test_a_field_with_two_roles_is_noticed() -> None:
  """In another role by itself, and in a section of another role."""
  assert problems({**FIELD_ROLES, 'more': ('dtype',)}) == ['dtype has 2 roles']
  assert problems({**FIELD_ROLES, 'more': ('moe.dispatch.dispatcher',)}) == [
    'moe.dispatch.dispatcher has 2 roles'
  ]
  assert 'init.std has 2 roles' in problems({**FIELD_ROLES, 'more': ('init',)})


def test_a_path_that_is_no_field_is_noticed() -> None:
  assert problems({**FIELD_ROLES, 'more': ('moe.router.top',)}) == ['moe.router.top is no field']


def test_fields_with_a_role_come_with_their_values_in_the_order_of_the_config() -> None:
  cfg = ModelConfig(
    dtype='bfloat16',
    attention=AttentionConfig(qk_norm='head'),
    moe=MoEConfig(RouterConfig(jitter=0.3)),
  )
  assert fields_with_role(cfg, 'precision') == {'dtype': 'bfloat16'}
  assert fields_with_role(cfg, 'training')['moe.router.jitter'] == 0.3
  both = fields_with_role(cfg, 'precision', 'function')
  assert both['attention.qk_norm'] == 'head' and both['attention.rope.yarn.factor'] == 1.0
  assert list(both) == [path for path in FIELDS if path in both]
  assert not {'remat', 'unroll', 'init.std', 'moe.router.jitter'} & both.keys()


def test_no_field_of_every_role_together_is_left_out() -> None:
  assert list(fields_with_role(ModelConfig(), *FIELD_ROLES)) == FIELDS
