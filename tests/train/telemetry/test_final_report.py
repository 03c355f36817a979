"""The lines of the last report: commands that can be copied, and a text that moves no cursor."""

import shlex
from pathlib import Path

import pytest

from moejax.train.telemetry.final_report import report_lines


def lines(text: str, workdir: str = 'runs/a', prompt: str = 'def ') -> list[str]:
  report = {'bits_per_byte': 2.0, 'best_bits_per_byte': 1.5, 'not_finite': [], 'digest': 'd' * 64}
  return report_lines(
    report, {}, {}, compared=[], usage='', text=text, workdir=Path(workdir), prompt=prompt
  )


@pytest.mark.parametrize('workdir', ['runs/a', "a [x]*? 'b'"])
@pytest.mark.parametrize('prompt', ['def ', 'say "$HOME" `ls` it\'s', ''])
def test_the_command_that_samples_can_be_copied(workdir: str, prompt: str) -> None:
  words = shlex.split(lines('', workdir, prompt)[-1])
  assert words[-2:] == [f'--workdir={workdir}', f'--prompt={prompt}']


def test_the_plain_command_is_plain() -> None:
  assert lines('')[-1].endswith(' -m moejax.generate --workdir=runs/a --prompt="def "')


def test_what_a_model_writes_does_not_reach_the_terminal_as_a_command() -> None:
  shown = lines('a\x1b[2Jb\tc\r\x00\x7f\x9b\nété 火')
  assert shown[2:4] == ['  a␛[2Jb\tc␍␀␡\ufffd', '  été 火']
