"""One process writes to a run directory, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.checkpoint import lock as checkpoint_lock
from moejax.checkpoint.lock import RunInUse


def test_a_second_lock_names_the_process_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
  code = (
    'import sys, time; from moejax.checkpoint.lock import hold_run_directory as lock\n'
    'with lock(sys.argv[1]): print(1, flush=True); time.sleep(60)'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.read(1) == b'1'
    with (
      pytest.raises(RunInUse, match=f'in use by process {other.pid};'),
      checkpoint_lock.hold_run_directory(tmp_path),
    ):
      pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with checkpoint_lock.hold_run_directory(tmp_path):
      assert (tmp_path / 'lock').read_text() == f'{os.getpid()}\n'
