"""How commands end: usage errors, Ctrl-C, and a stdout that nobody reads."""

import subprocess
import sys

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
