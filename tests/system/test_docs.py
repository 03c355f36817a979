"""README and docs/: what is written can be run, what is linked is there, the README is short."""

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax import generate
from moejax.__main__ import train_or_plan
from moejax.config.flags import parse_flags
from moejax.plan.topology import parse_topology
from moejax.runtime.launch import read_launch_flags
from moejax.train.experiment.config import DEFAULT_CONFIG, ExperimentConfig
from tests.support import documents
from tests.support.documents import PAGES, ROOT, Command
from tests.support.unoptimised import unoptimised

COMMANDS = documents.commands()
# What stands for something of the reader's own.
PLACEHOLDERS = {'FILE': 'configs/tiny.py'}
# A run of two tiny steps, whatever else a command asks for.
SMALL = (
  '--config.steps=2',
  '--config.batch_size=8',
  '--config.seq_len=16',
  '--config.data.source=synthetic',
  '--config.data.synthetic_tokens=8000',
  '--config.data.tokenizer=bytes',
  '--config.model.d_model=16',
  '--config.model.num_layers=1',
  '--config.model.num_dense_layers=0',
  '--config.model.moe.d_expert=8',
  # One device is the quickest to compile for; what devices share is tested elsewhere.
  '--config.mesh.data=1',
  '--config.eval.batches=1',
  '--config.eval.sample_tokens=0',
  '--config.log_every=1',
)


class ParsedError(Exception):
  """The command's own parser has accepted its arguments."""


@contextlib.contextmanager
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """Ends a command as soon as its argparse parser has accepted what it was given."""
  parse = argparse.ArgumentParser.parse_args

  def parse_and_end(self: argparse.ArgumentParser, *args: object) -> None:
    parse(self, *args)
    raise ParsedError

  with monkeypatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_end)
    yield


def filled_in(words: tuple[str, ...]) -> list[str]:
  """The words of a command, its placeholders replaced."""
  return [re.sub(r'\bFILE\b', PLACEHOLDERS['FILE'], word) for word in words]


def plan_flags(argv: list[str]) -> dict[str, str]:
  """--plan and --topology of a command, by their names."""
  flags = [arg for arg in argv if arg.startswith(('--plan', '--topology'))]
  return {name: value for name, _, value in (flag.partition('=') for flag in flags)}


def test_the_pages_hold_commands() -> None:
  assert len(PAGES) >= 8 and len(COMMANDS) >= 25
  assert {'train.py', '-m'} <= {command.words[1] for command in COMMANDS}


@pytest.mark.parametrize('command', COMMANDS, ids=str)
def test_a_command_is_accepted_by_what_it_calls(
  command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
  program, *argv = filled_in(command.words)
  monkeypatch.chdir(ROOT)
  if program == 'make':
    targets = re.search(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)[1]
    assert argv[0] in targets.split()
  elif argv[0] == 'train.py':
    plan = plan_flags(argv)
    if plan:
      parse_topology(plan['--topology'])
    rest = [arg for arg in argv[1:] if arg.partition('=')[0] not in (*plan, '--help')]
    # 'dry' of what starts processes: nothing is connected to.
    _, rest = read_launch_flags(rest)
    assert parse_flags(rest, ExperimentConfig, DEFAULT_CONFIG)
  else:
    assert argv[0] == '-m', command
    name, *args = argv[1:]
    is_package = name in ('moejax.hf', 'moejax.certify')
    module = importlib.import_module(f'{name}.__main__' if is_package else name)
    monkeypatch.setattr(sys, 'argv', [name, *args])
    with parsing_only(monkeypatch), pytest.raises(ParsedError):
      module.main() if name.startswith('benchmarks') else module.main(args)


@pytest.mark.parametrize(
  'snippet', list(documents.blocks('python')), ids=lambda snippet: snippet.page
)
def test_python_of_a_page_runs(snippet: documents.Snippet) -> None:
  for other in re.findall(r'^(?:import|from) (torch|transformers)\b', snippet.source, re.MULTILINE):
    pytest.importorskip(other)  # of the extra `parity`
  names: dict[str, object] = {}
  exec(compile(snippet.source, snippet.page, 'exec'), names)
  if 'aux' in names:
    assert names['y'].shape == (4, 16, 32) and names['aux'].load.sum() == 4 * 16 * 2


TRAINING = [
  command
  for command in COMMANDS
  if command.words[1] == 'train.py'
  and not plan_flags([*command.words])
  and not any(word.startswith(('--coordinator', '--config.init_from')) for word in command.words)
]


@pytest.mark.slow
def test_the_trainings_of_all_pages_run_and_what_they_leave_is_sampled_and_drawn(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  """One after another in one place, each cut down to two tiny steps."""
  for name in ('configs', 'docs', 'notebooks'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'a.md').write_text('Some notes, all of them of one kind.\n' * 400)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  assert len(TRAINING) >= 8
  for command in TRAINING:
    # Of the standard library's 11 MB it would take longer to read than to train.
    argv = [word.replace('stdlib', 'synthetic') for word in filled_in(command.words[2:])]
    is_mixture = any('mixture' in word for word in argv)
    small = [flag for flag in SMALL if not (is_mixture and 'data.source' in flag)]
    with unoptimised():
      assert train_or_plan([*argv, *small]) == 0, command
  assert (tmp_path / 'runs' / 'a' / 'report.json').exists()
  assert generate.main(['--workdir=runs/a', '--prompt=def ', '--max_tokens=4']) == 0
  picture = importlib.import_module('benchmarks.load_picture')
  runs = ['no balance=runs/unbalanced', 'balanced=runs/balanced']
  monkeypatch.setattr(sys, 'argv', ['load_picture', *runs, '--out=expert_load.svg'])
  assert picture.main() == 0
  assert (tmp_path / 'expert_load.svg').read_text().count('<image') == 2
  monkeypatch.setattr(sys, 'argv', ['load_picture', 'nothing', '--out=x.svg'])
  assert picture.main() == 2 and 'give LABEL=DIRECTORY' in capsys.readouterr().err


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_and_names_is_there(page: Path) -> None:
  for link in documents.links(page):
    path, _, anchor = link.partition('#')
    target = page.parent / path if path else page
    assert target.exists(), link
    assert not anchor or anchor in documents.anchors(target), link
  for name in documents.NAMED.findall(page.read_text()):
    for path in documents.expand(name):
      assert list(ROOT.glob(path.rstrip('/'))), path


def test_the_readme_is_short_and_its_tables_have_their_marks() -> None:
  readme = (ROOT / 'README.md').read_text()
  assert readme.count('\n') <= 150
  marks = {
    'README.md': 'certificate',
    'docs/scaling.md': 'meshes',
    'docs/faults.md': 'faults',
    'docs/families.md': 'families',
  }
  for page, mark in marks.items():
    text = (ROOT / page).read_text()
    assert text.count(f'<!-- {mark} -->') == text.count(f'<!-- /{mark} -->') == 1, page
