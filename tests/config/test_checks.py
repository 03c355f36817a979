"""Checks of a config: a problem where something is wrong, '' or none where it is not."""

import math
from types import SimpleNamespace

import pytest

from moejax.config import ConfigError, at_least, check, not_one_of, problem_if, unknown


def test_a_problem_is_its_text_only_where_something_is_wrong() -> None:
  assert problem_if(3 > 2, 'too many') == 'too many'
  assert problem_if(3 > 4, 'too many') == ''
  assert problem_if('x', 'not empty') == 'not empty' and problem_if([], 'not empty') == ''


def test_at_least_names_each_field_below_in_the_order_asked() -> None:
  config = SimpleNamespace(a=0, b=1, c=-2.5, d=math.nan, e=math.inf)
  assert at_least(1, config, 'c', 'a', 'b', 'e') == ['c=-2.5: use 1 or more', 'a=0: use 1 or more']
  assert at_least(0, config, 'a', 'b') == []
  assert at_least(0, config, 'd') == ['d=nan: use 0 or more'], 'NaN is no number to train with'
  assert at_least(0.5, config, 'a') == ['a=0: use 0.5 or more']


def test_at_least_says_what_the_least_value_means() -> None:
  config = SimpleNamespace(a=-1)
  assert at_least(0, config, 'a', meaning='off') == ['a=-1: use 0 (off) or more']


def test_not_one_of_lists_all_names_in_order() -> None:
  table = {'sign': 1, 'none': 2}
  assert not_one_of('rule', 'none', table) == ''
  assert not_one_of('rule', 'sine', table) == "rule='sine' is not one of ['none', 'sign']"


def test_an_unknown_field_gets_the_nearest_name_or_all() -> None:
  assert unknown('a.stepz', ['steps', 'seed']) == 'a.stepz: no such field; did you mean steps?'
  assert unknown('a.qq', {'steps': 1, 'seed': 2}).endswith('did you mean seed or steps?')


def test_helpers_are_arguments_of_check() -> None:
  config = SimpleNamespace(a=-1, b=-1)
  with pytest.raises(ConfigError) as error:
    check(
      problem_if(True, 'one'),
      problem_if(False, 'none'),
      *at_least(0, config, 'a', 'b'),
      not_one_of('c', 'x', ()),
    )
  assert error.value.problems == (
    'one',
    'a=-1: use 0 or more',
    'b=-1: use 0 or more',
    "c='x' is not one of []",
  )
