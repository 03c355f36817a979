"""Signals to stop: heard while the main thread is away, and never the end of unsaved work."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moejax.runtime.signals import STOPPING, stop_signals


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  """The statuses with which the process would have ended, in order."""
  statuses: list[int] = []
  monkeypatch.setattr(os, '_exit', statuses.append)
  return statuses


def wait_until(is_so: object) -> None:
  end = time.monotonic() + 5
  while not is_so() and time.monotonic() < end:
    time.sleep(0.01)
  assert is_so()


@pytest.mark.parametrize('number', STOPPING)
def test_the_first_signal_is_kept_where_there_is_something_to_save_and_the_second_ends(
  number: int, ends: list[int]
) -> None:
  before = signal.getsignal(number)
  with stop_signals() as stop:
    stop.has_unsaved = True
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.received == [number])
    time.sleep(0.05)  # the other thread has heard of it, too
    assert ends == []
    os.kill(os.getpid(), number)
    wait_until(lambda: 128 + number in ends)
  assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1


def test_a_signal_ends_at_once_where_there_is_nothing_to_save(
  ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
  with stop_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: 143 in ends)
  assert 'stopped by signal 15: there was nothing to save' in capfd.readouterr().err


def test_under_nohup_a_hang_up_changes_nothing(ends: list[int]) -> None:
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_signals() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.05)
      assert stop.received == [] and ends == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


BUSY = """
import hashlib
from moejax.runtime.signals import stop_signals
with stop_signals():
  print('busy', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'x', b'y', 100_000_000)  # outside of Python, as a compiler is
"""


def test_a_signal_is_heard_while_the_main_thread_is_outside_of_python() -> None:
  with subprocess.Popen(
    [sys.executable, '-c', BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'busy\n'
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[1]
    assert time.monotonic() - begin < 5  # seconds; alone it would be about a minute
  assert process.returncode == 143 and 'nothing to save' in output and 'Traceback' not in output
