"""Output that cannot be written is lost, told once, and nothing else comes of it."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moejax.runtime.steady_output import SteadyStream, steady_output


class Full(io.RawIOBase):
  """A file on a disk without room, until `room` is set."""

  room, content = False, b''

  def writable(self) -> bool:
    return True

  def write(self, piece: bytes) -> int:
    if not self.room:
      raise OSError(28, 'No space left on device')
    self.content += bytes(piece)
    return len(piece)


def test_a_full_disk_is_told_once_and_so_is_room(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  caplog.set_level(logging.WARNING)
  disk = Full()
  file = io.TextIOWrapper(io.BufferedWriter(disk), encoding='utf-8')
  monkeypatch.setattr(sys, 'stdout', file)
  with steady_output():
    print('one', flush=True)
    print('', end='', flush=True)
    Console().print('two')
    disk.room = True
    print('three')
  assert disk.content.endswith(b'three\n') and sys.stdout is file
  assert [record.getMessage() for record in caplog.records] == [
    'stdout: No space left on device: training goes on, and what is not logged now is lost',
    'stdout: there is room again, logs are written',
  ]


def test_a_closed_pipe_is_told_once_and_given_up(caplog: pytest.LogCaptureFixture) -> None:
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, 'w') as pipe:
    stream = SteadyStream(pipe, 'stdout')
    for _ in range(3):
      stream.write('line\n')
      stream.flush()
    assert [record.getMessage() for record in caplog.records] == [
      'stdout is closed (Broken pipe): training goes on'
    ]


def test_a_letter_that_the_terminal_lacks_is_a_question_mark(tmp_path: Path) -> None:
  with open(tmp_path / 'log', 'w', encoding='ascii') as file:
    assert SteadyStream(file, 'stdout').write('load ▄▅ é\n') == 10
  assert (tmp_path / 'log').read_text() == 'load ?? ?\n'


@pytest.mark.parametrize('redirection', ['2>&1 | head -1', '>/dev/full', '>&- 2>&-'])
def test_a_process_ends_well_whatever_became_of_its_output(redirection: str) -> None:
  code = (
    'import sys\\nfrom moejax.runtime.steady_output import steady_output\\n'
    'with steady_output():\\n for i in range(20000): print(i); print(i, file=sys.stderr)\\n'
    'sys.exit(7)'
  )
  script = f"set -o pipefail; {sys.executable} -c $'{code}' {redirection}"
  done = subprocess.run(['bash', '-c', script], capture_output=True, text=True)
  assert done.returncode == 7, done.stderr[-500:]
  assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr
