"""What a process does with the answers of the others, which are given by hand here."""

import pytest

from moejax.config import ConfigError
from moejax.runtime import multiprocess
from moejax.runtime.multiprocess import check_alike, fail_together

KINDS = (ConfigError, OSError)


def answers(monkeypatch: pytest.MonkeyPatch, others: list[int]) -> list[int]:
  """Lets the other processes answer so; returns the list of what this one, the first, has said."""
  said: list[int] = []

  def gather(number: int) -> list[int]:
    said.append(number)
    return [number, *others]

  monkeypatch.setattr(multiprocess, 'gather_ints', gather)
  return said


def test_alone_nothing_changes() -> None:
  with fail_together(*KINDS):
    pass
  with pytest.raises(OSError, match='^mine$'), fail_together(*KINDS):
    raise OSError('mine')


def test_an_error_in_one_process_is_one_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
  said = answers(monkeypatch, [0, 2, 0])
  text = '^process 2 failed with OSError; see its log$'
  with pytest.raises(OSError, match=text), fail_together(*KINDS):
    pass
  assert said == [0]
  answers(monkeypatch, [0, 1])
  with pytest.raises(ConfigError, match='^process 2 failed with ConfigError'):
    with fail_together(*KINDS):
      pass


def test_a_process_that_fails_raises_its_own_error(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  said = answers(monkeypatch, [1])
  with pytest.raises(OSError, match='^mine$'), fail_together(*KINDS):
    raise FileNotFoundError('mine')
  assert said == [2], 'the place of OSError, which it is one of'
  assert not caplog.records, 'the first process says itself what it raises'


def test_a_process_that_is_not_the_first_logs_what_the_first_does_not_know(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  monkeypatch.setattr(multiprocess, 'gather_ints', lambda number: [0, number])
  with pytest.raises(ConfigError, match='^mine$'), fail_together(*KINDS):
    raise ConfigError('mine')
  assert [record.getMessage() for record in caplog.records] == ['process 0: mine']


def test_an_error_of_another_kind_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
  said = answers(monkeypatch, [0])
  with pytest.raises(KeyError), fail_together(*KINDS):
    raise KeyError('x')
  assert said == [], 'it ends the process, and nobody is asked'


def test_texts_that_differ_name_the_first_process_that_does(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  said = answers(monkeypatch, [])
  check_alike('the config', 'a')
  assert 0 <= said[0] < 2**28, 'fits in the i32 that is gathered'
  answers(monkeypatch, [said[0], said[0] + 1, said[0] + 2])
  with pytest.raises(ConfigError, match='^the config of process 2 is not that of process 0'):
    check_alike('the config', 'a')
