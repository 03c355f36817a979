"""A signal while the text is read ends the run there, with nothing half written."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data import sources
from moejax.data.tokenizer import load_tokenizer
from moejax.train.interruption import Stopped, heeding_signals
from moejax.train.trainer import train
from tests.support.tiny_run import config


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_text_is_tokenised(
  number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def documents(path: str, layout: object) -> Iterator[str]:
    yield 'some text\n' * 99
    os.kill(os.getpid(), number)
    yield from ('never read' for _ in iter(int, 1))  # without end

  monkeypatch.setattr(sources, 'read_documents', documents)
  (tmp_path / 'a.txt').write_text('x')
  before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
  cfg = config(tmp_path / 'run', data__source='text', data__path=f'{tmp_path}/a.txt')
  assert train(cfg) == 128 + number
  assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
  assert not list((tmp_path / 'cache').glob('*'))


def test_a_signal_is_known_where_a_library_makes_another_error_of_it() -> None:
  received: list[int] = []

  def documents() -> Iterator[str]:
    yield 'some text'
    os.kill(os.getpid(), signal.SIGTERM)
    yield 'more'

  with pytest.raises(Stopped, match='signal 15 before the first step'):
    with heeding_signals(received):
      load_tokenizer('bpe:300', documents())
  assert received == [signal.SIGTERM]
  with pytest.raises(Stopped):  # one that came before the block
    with heeding_signals(received):
      raise AssertionError
  with pytest.raises(ConfigError):
    with heeding_signals([]):
      raise ConfigError('x')
