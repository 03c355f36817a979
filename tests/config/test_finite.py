"""No number of any config is NaN or inf, however it is written; problems name their fields."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.config import ConfigError, above_zero, from_config_dict, frozendict, not_finite
from moejax.config.flags import parse_flags
from moejax.config.schedule import schedule_problem
from moejax.inference.sampling import SampleConfig
from moejax.model.cross_entropy import LossConfig
from moejax.train.experiment.config import ExperimentConfig

BAD = [math.nan, math.inf, -math.inf, 1e39, -1e39, np.float32(math.nan)]
TINY = str(Path(moejax.__file__).parents[1] / 'configs' / 'tiny.py')


def sections(config: object) -> Iterator[object]:
  """Yields a config and all sections in it."""
  yield config
  for value in vars(config).values():
    if dataclasses.is_dataclass(value):
      yield from sections(value)


def float_fields() -> list[tuple[type, str]]:
  found = {}
  for section in (*sections(ExperimentConfig()), SampleConfig()):
    for field in dataclasses.fields(section):
      if isinstance(getattr(section, field.name), float):
        found[f'{type(section).__name__}.{field.name}'] = type(section), field.name
  return [*found.values()]


def problems_of(cls: type, **fields: object) -> tuple[str, ...]:
  with pytest.raises(ConfigError) as error:
    cls(**fields)
  return error.value.problems


def test_no_config_is_left_out() -> None:
  """What these tests walk are all the classes in the package that check themselves."""
  walked = {type(section).__name__ for section in (*sections(ExperimentConfig()), SampleConfig())}
  written = set()
  for path in Path(moejax.__file__).parent.rglob('*.py'):
    for part in path.read_text().split('\nclass ')[1:]:
      if 'def __post_init__' in part:
        written.add(part.partition(':')[0])
  # A claim about a foreign function is no part of an experiment: tests/certify.
  assert walked == written - {'Claim'}


@pytest.mark.parametrize(
  ('cls', 'name'), float_fields(), ids=lambda part: getattr(part, '__name__', part)
)
def test_every_float_is_finite(cls: type, name: str) -> None:
  for bad in BAD:
    assert problems_of(cls, **{name: bad}) == (
      f'{name}={bad!r}: use a finite number, 3.4e+38 at most',
    )


def test_entries_of_tables_and_tuples_have_a_path() -> None:
  for bad in BAD:
    assert problems_of(LossConfig, task_weights=frozendict(a=1.0, b=bad)) == (
      f'task_weights.b={bad!r}: use a finite number, 3.4e+38 at most',
    )
  for bad in ('high', '', 'nan', '1,0', '1e999', -1.0):
    assert problems_of(LossConfig, task_weights=frozendict(b=bad)) == (
      f'task_weights.b={bad!r}: use a number of 0 or more',
    )

  @dataclasses.dataclass
  class Windows:
    sizes: tuple = (1.0, math.nan)

  assert not_finite(Windows()) == ['sizes[1]=nan: use a finite number, 3.4e+38 at most']


def test_a_number_above_zero_is_one_in_float32() -> None:
  @dataclasses.dataclass
  class Norm:
    eps: float

  for eps in (0.0, -1.0, 1e-39, 1e-320, math.nan):
    assert above_zero(Norm(eps), 'eps') == [f'eps={eps}: use a number above 0, 1.2e-38 at least']
  assert not above_zero(Norm(1e-37), 'eps')


@pytest.mark.parametrize(
  'text', ['nan', 'inf', '-inf', '1e999', 'Infinity', '1e39', '1' + '0' * 400]
)
def test_flags_and_schedules_give_no_such_number(text: str) -> None:
  assert schedule_problem('rate', text) and schedule_problem('rate', f'1, {text}@50%')
  names = 'optim.clip_norm', 'model.moe.router.expert_dropout', 'hang_after'
  argv = [f'--config.{name}={text}' for name in names]
  with pytest.raises(ConfigError) as error:
    parse_flags([f'--config={TINY}', *argv, '--config.optim.eps=0'], ExperimentConfig, TINY)
  *of_numbers, last = sorted(error.value.problems, key=lambda problem: 'optim: eps' in problem)
  assert [problem.partition('=')[0] for problem in of_numbers] == [
    'config.hang_after',
    'config.model.moe.router.expert_dropout',
    'config.optim.clip_norm',
  ]
  assert 'eps=0' in last, 'the rest of a section is checked without it'


def test_a_config_file_gives_no_such_number() -> None:
  """JSON, which Python reads NaN and Infinity in, and whole numbers of any size."""
  for text in ('NaN', 'Infinity', '1e999', '1' + '0' * 400):
    contents = json.loads(f'{{"loss": {{"task_weights": {{"a": {text}}}}}, "hang_after": {text}}}')
    with pytest.raises(ConfigError) as error:
      from_config_dict(ExperimentConfig, contents)
    paths = [problem.partition('=')[0] for problem in error.value.problems]
    # The task is not one of the data, which is one more problem.
    assert paths[:2] == ['config.hang_after', 'config.loss.task_weights.a'], paths
