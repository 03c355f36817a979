"""Models by their name on the hub: what is fetched, and what is told where that cannot be."""

import fnmatch
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax.hf.hub import fetched
from tests.hf.commands import run
from tests.support.published_models import copied


def with_hub(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
  """Puts a package in the place of huggingface_hub; nothing is downloaded here."""
  package = SimpleNamespace(snapshot_download=download) if download else None
  monkeypatch.setitem(sys.modules, 'huggingface_hub', package)


def test_a_name_is_fetched_and_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Of what a publisher has in the repository, only what is read."""
  snapshot = copied('llama', tmp_path / 'snapshot')
  wanted: list[str] = []

  def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
    assert name == 'some-org/A.Model-1b'
    there = [path.name for path in snapshot.iterdir()] + [
      'pytorch_model.bin',
      'modeling_llama.py',
      'consolidated.safetensors',
      'tokenizer.json',
      'original/model.safetensors',
    ]
    for file in there:
      is_allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
      if is_allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
        wanted.append(file)
    return str(snapshot)

  with_hub(monkeypatch, download)
  monkeypatch.chdir(tmp_path)
  assert run('import', 'some-org/A.Model-1b', f'--out={tmp_path / "run"}') == 0
  assert (tmp_path / 'run' / 'checkpoints' / '0').is_dir()
  assert sorted(wanted) == sorted([*(path.name for path in snapshot.iterdir()), 'tokenizer.json'])


def test_a_directory_is_not_looked_for_on_the_hub(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with_hub(monkeypatch, pytest.fail)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  for source in ('org/name', './a', '../a/b', '/a/b', 'a', 'a/b/c', str(tmp_path)):
    assert fetched(source) == source


@pytest.mark.parametrize('command', ['import', 'show', 'logits'])
def test_without_network_or_package_it_is_one_line(
  command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  def offline(*args: object, **kwargs: object) -> None:
    raise ConnectionError('cannot reach\nthe hub')

  monkeypatch.chdir(tmp_path)
  flags = {
    'import': ['org/name', '--out=x'],
    'show': ['org/name'],
    'logits': ['--model=org/name', '--tokens=t', '--out=x'],
  }
  told = {
    None: "moejax.hf: org/name is no directory here; to fetch it .*pip install 'moejax\\[hub\\]'\n",
    offline: 'moejax.hf: org/name is no directory .* ConnectionError: cannot reach the hub; .*\n',
  }
  for download, wanted in told.items():
    with_hub(monkeypatch, download)
    assert run(command, *flags[command]) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(wanted, said), said
