"""Help about a config: every field of it, with what its dataclass says and the names it takes."""

import dataclasses

from moejax.config import check, frozendict, not_one_of, to_config_dict
from moejax.config.fields import walk_fields
from moejax.config.help_text import choices, field_meanings, help_lines
from moejax.train.experiment.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Part:
  """A part.

  shape: how it looks,
    from the side.
  low, high: where it ends.
  """

  shape: str = 'round'
  low: int = 0
  high: int = 9
  colour: str = ''  # of the front; '' for none
  # How heavy it is,
  # in grams.
  weight: float = 1.0
  silent: bool = False

  def __post_init__(self) -> None:
    check(not_one_of('shape', self.shape, ('round', 'flat')))


@dataclasses.dataclass(frozen=True)
class Whole:
  """All of it,
  in a few words.

  More of them.
  """

  part: Part = Part()
  losses: frozendict = frozendict(sequence=0.01)
  steps: int = 3  # how many

  def __post_init__(self) -> None:
    check()


def test_meanings_are_those_of_docstring_and_comments() -> None:
  assert field_meanings(Part) == {
    'shape': 'how it looks, from the side.',
    'low': 'where it ends.',
    'high': 'where it ends.',
    'colour': "of the front; '' for none",
    'weight': 'How heavy it is, in grams.',
  }


def test_choices_are_what_the_check_answers() -> None:
  assert choices(Part, 'shape') == "one of ['flat', 'round']"
  assert choices(Part, 'colour') == choices(Part, 'low') == ''


def test_sections_come_after_the_fields_beside_them() -> None:
  lines = list(help_lines(Whole, to_config_dict(Whole(steps=5))))
  assert lines == [
    '',
    'config: All of it, in a few words.',
    '  --config.losses.NAME=VALUE',
    '  --config.losses.sequence=0.01',
    '  --config.steps=5',
    '      how many',
    '',
    'config.part: A part.',
    "  --config.part.colour=''",
    "      of the front; '' for none",
    '  --config.part.high=9',
    '      where it ends',
    '  --config.part.low=0',
    '      where it ends',
    "  --config.part.shape='round'",
    "      how it looks, from the side; one of ['flat', 'round']",
    '  --config.part.silent=False',
    '  --config.part.weight=1.0',
    '      How heavy it is, in grams',
  ]


def test_help_of_an_experiment_has_every_field_and_nearly_all_have_a_meaning() -> None:
  config = to_config_dict(ExperimentConfig())
  lines = list(help_lines(ExperimentConfig, config))
  for path, value in walk_fields(config):
    assert f'  --config.{path}={value!r}' in lines, path
  assert all(len(line) <= 100 for line in lines)
  text = ' '.join(' '.join(lines).split())
  assert "one of ['constant', 'cosine', 'phases', 'wsd']" in text
