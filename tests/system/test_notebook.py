"""The quickstart notebook: in step with its script, without outputs, and it runs."""

import glob
import os
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbclient
import nbformat
import pytest

from tests.support.trainer_process import xla_flags

NOTEBOOK = Path(__file__).parents[2] / 'notebooks' / 'quickstart.ipynb'


def test_notebook_and_script_are_one() -> None:
  """After an edit of either: jupytext --sync notebooks/quickstart.ipynb."""
  notebook, script = nbformat.read(NOTEBOOK, 4), jupytext.read(NOTEBOOK.with_suffix('.py'))
  assert [(c.cell_type, c.source) for c in notebook.cells] == [
    (c.cell_type, c.source) for c in script.cells
  ]


def test_no_outputs_are_committed_and_colab_finds_a_tpu() -> None:
  notebook = nbformat.read(NOTEBOOK, 4)
  assert all(
    not cell.outputs and cell.execution_count is None
    for cell in notebook.cells
    if cell.cell_type == 'code'
  )
  assert notebook.metadata['accelerator'] == 'TPU' and 'colab' in notebook.metadata
  assert 'colab-badge.svg' in notebook.cells[0].source


def test_it_defines_nothing() -> None:
  cells = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == 'code']
  lines = [line for cell in cells for line in cell.splitlines()]
  assert not [line for line in lines if line.lstrip().startswith(('def ', 'class ', 'lambda'))]


class Shell:
  """In the place of subprocess.run: git and pip as the first cell calls them, and nothing else."""

  def __init__(self) -> None:
    self.installed, self.said = '', []

  def run(self, words: list[str], **kwargs: object) -> SimpleNamespace:
    status, out = 0, 'jax==1\n'
    if words[:2] == ['git', 'clone']:
      self.said.append('clone')
      (Path('moejax') / 'moejax').mkdir(parents=True)
      (Path('moejax') / 'pyproject.toml').touch()
      (Path('moejax') / 'moejax' / '__init__.py').touch()
    elif 'install' in words:
      assert Path('pyproject.toml').exists() and words[-2] == '-e'
      self.installed = words[-1]
      self.said.append(words[-1])
    elif 'show' in words:
      status = 0 if self.installed else 1
    else:
      assert 'freeze' in words, words
    return SimpleNamespace(returncode=status, stdout=out)


@pytest.mark.parametrize(('device', 'target'), [('', '.'), ('/dev/accel0', '.[tpu]')])
def test_the_first_cell_finds_the_clone_wherever_it_is_run_again(
  device: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """From the parent of the clone, twice; in it; in its notebooks. On a TPU with its extra."""
  cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == 'code']
  shell = Shell()
  monkeypatch.setattr(subprocess, 'run', shell.run)
  monkeypatch.setattr(glob, 'glob', lambda pattern: [device] if fnmatch(device, pattern) else [])
  clone = tmp_path / 'moejax'
  for _ in range(2):
    monkeypatch.chdir(tmp_path)
    exec(cells[0].source, {})
    assert Path.cwd() == clone and shell.said == ['clone', target]
  (clone / 'notebooks').mkdir()
  for place in (clone, clone / 'notebooks'):
    monkeypatch.chdir(place)
    exec(cells[0].source, {})
    assert Path.cwd() == clone and shell.said == ['clone', target]
  # Another runtime, in which the clone lies on Drive.
  shell.installed = ''
  monkeypatch.chdir(tmp_path)
  exec(cells[0].source, {})
  assert shell.said == ['clone', target, target]


def test_on_a_tpu_it_computes_in_bfloat16_and_jax_is_not_imported_before_it_is_installed() -> None:
  sources = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells]
  [training] = [source for source in sources if 'config = get_config()' in source]
  assert "if jax.default_backend() == 'tpu':\n  config.model.dtype = 'bfloat16'" in training
  first = next(source for source in sources if 'subprocess' in source)
  assert 'import jax' not in first and "drive.mount('/content/drive')" in ''.join(sources)


# What the notebook trains, cut down: the whole held-out text alone takes half a minute to read.
SMALL = {
  'batch_size': 8,
  'seq_len': 64,
  'data.source': 'synthetic',
  'data.synthetic_tokens': 20_000,
  'data.tokenizer': 'bytes',
  'model.d_model': 32,
}


def cut_down(notebook: nbformat.NotebookNode) -> None:
  """Makes the notebook's config small, right before the first training."""
  [cell] = [cell for cell in notebook.cells if 'config = get_config()' in cell.source]
  before, training, after = cell.source.partition('status = train(')
  assert training, cell.source
  cell.source = f'{before}config.update_from_flattened_dict({SMALL})\n{training}{after}'


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('QUICKSTART_STEPS', '8')
  monkeypatch.setenv('QUICKSTART_WORKDIR', str(tmp_path / 'run'))
  monkeypatch.setenv('XLA_FLAGS', xla_flags())
  monkeypatch.setenv(
    'PYTHONPATH', os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get('PYTHONPATH') or ''])
  )
  notebook = nbformat.read(NOTEBOOK, 4)
  cut_down(notebook)
  resources = {'metadata': {'path': str(NOTEBOOK.parent)}}
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources=resources
  ).execute()
  outputs = [
    output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs
  ]
  printed = ''.join(output.text for output in outputs if output.output_type == 'stream')
  assert (
    printed.count('exit status 0') == 2 and 'stopped by stop_after after step 4 of 8' in printed
  )
  assert 'resuming after step 4' in printed and 'step 8:\ndef ' in printed, printed
  assert any(
    'image/png' in output.data for output in outputs if output.output_type == 'display_data'
  )
