"""The fields of a nested config: each once, in order, by its path; and which lie in a section."""

from ml_collections import ConfigDict

from moejax.config import frozendict, to_config_dict
from moejax.config.fields import Field, is_under, walk_fields
from tests.config.small_config import Model, Root

FIELDS = [
  Field('steps', 10),
  Field('workdir', ''),
  Field('model.d_model', 64),
  Field('model.tied', False),
  Field('model.layers', (1, 2)),
  Field('model.router.top_k', 2),
  Field('model.router.scale', 1.0),
]


def test_every_field_of_a_dataclass_comes_once_in_order() -> None:
  assert [*walk_fields(Root())] == [*FIELDS, Field('losses', frozendict(sequence=0.01))]


def test_a_config_dict_has_the_same_fields_and_each_entry_of_its_tables() -> None:
  config = to_config_dict(Root())
  assert sorted(walk_fields(config)) == sorted([*FIELDS, Field('losses.sequence', 0.01)])
  assert [*walk_fields(ConfigDict({'b': {'c': 1}, 'a': {}}))] == [Field('b.c', 1)]


def test_a_prefix_is_put_before_each_path() -> None:
  assert [field.path for field in walk_fields(Model(), 'x.')][:2] == ['x.d_model', 'x.tied']
  assert [field.path for field in walk_fields(Model(), 'x.')][-1] == 'x.router.scale'


def test_a_path_is_under_itself_and_its_sections_and_under_no_part_of_a_name() -> None:
  assert is_under('model.moe.router.top_k', ['model.moe'])
  assert is_under('model.moe', ['data', 'model.moe'])
  assert not is_under('model.moe', ['model.moe.router'])
  assert not is_under('model.moex', ['model.moe']) and not is_under('a', ['a.b'])
  assert not is_under('a', [])
