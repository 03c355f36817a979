"""How commands end: usage errors, Ctrl-C, and a stdout that nobody reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.runtime.command import CommandParser, run_quietly, usage_error


def test_every_problem_is_a_line_that_names_the_command() -> None:
  error = ConfigError('steps=0: use 1 or more', 'no such flag')
  assert usage_error('moejax.train', error) == (
    'moejax.train: steps=0: use 1 or more\nmoejax.train: no such flag'
  )


def test_a_parser_tells_its_errors_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
  parser = CommandParser(prog='python -m moejax.generate')
  with pytest.raises(SystemExit) as stop:
    parser.parse_args(['--stray'])
  assert stop.value.code == 2
  assert capsys.readouterr().err == (
    'moejax.generate: unrecognized arguments: --stray; --help lists all flags\n'
  )


def test_ctrl_c_is_a_status() -> None:
  def interrupted(argv: list[str]) -> int:
    raise KeyboardInterrupt

  assert run_quietly(interrupted, []) == 130


def test_a_closed_stdout_ends_a_command_quietly() -> None:
  code = (
    'import sys; from moejax.runtime.command import run_quietly\n'
    'sys.exit(run_quietly(lambda argv: print(*range(99999), sep="\\n"), []))'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 141


def test_streams_that_are_closed_are_no_files_of_the_command(tmp_path: Path) -> None:
  """Not even for libraries, which write to descriptors and not to sys.stdout."""
  code = (
    'import os, sys; from moejax.runtime.command import run_quietly\n'
    'def main(argv):\n'
    '  with open(argv[0], "wb", buffering=0) as file:\n'
    '    file.write(b"content")\n'
    '    print("noise"); print("noise", file=sys.stderr)\n'
    '    os.write(1, b"noise"); os.write(2, b"noise")\n'
    '  return 3\n'
    'sys.exit(run_quietly(main, sys.argv[1:]))'
  )
  command = ['sh', '-c', 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, '-c', code]
  assert subprocess.run([*command, str(tmp_path / 'file')]).returncode == 3
  assert (tmp_path / 'file').read_bytes() == b'content'
