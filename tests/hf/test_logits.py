"""Logits of published files and of a run; bad token ids are one message and leave nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moejax.config import check
from moejax.hf import logits
from moejax.train.experiment.run_dir import CONFIG_FILE
from tests.hf.commands import Evil, imported, logits_of, run
from tests.support.published_models import GOLDEN, NAMES, copied

SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures('cheap_programs')


@pytest.mark.parametrize(
  'name', ['mixtral', *(pytest.param(n, marks=SLOW) for n in NAMES if n != 'mixtral')]
)
def test_logits_are_those_of_the_golden_of_files_and_of_a_run(name: str, tmp_path: Path) -> None:
  source, golden = copied(name, tmp_path / 'source'), np.load(GOLDEN / name / 'golden.npz')

  for model in (source, imported(source, tmp_path / 'run')):
    ours = logits_of(model, golden['tokens'].astype(np.uint16), tmp_path)
    assert ours.dtype == np.float32 and np.abs(ours - golden['logits']).max() < 1e-4
  assert {*os.listdir(tmp_path)} == {'source', 'run', 'ids.npy', 'out.npy'}


def test_a_run_with_capacity_writes_what_it_gives_without_and_says_so(
  tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
  source = copied('mixtral', tmp_path / 'source')
  workdir = imported(source, tmp_path / 'run')
  tokens = np.load(GOLDEN / 'mixtral' / 'golden.npz')['tokens']
  want = logits_of(workdir, tokens, tmp_path)
  assert 'capacity_factor' not in capfd.readouterr().err
  config = json.loads((workdir / CONFIG_FILE).read_text())
  config['model']['moe']['dispatch'] |= {'dispatcher': 'dense_matmul', 'capacity_factor': 0.5}
  (workdir / CONFIG_FILE).write_text(json.dumps(config))
  np.testing.assert_array_equal(logits_of(workdir, tokens, tmp_path), want)
  assert capfd.readouterr().err.count('trained with dispatch.capacity_factor=0.5') == 1
  assert run('export', f'--workdir={workdir}', f'--out={tmp_path / "out"}') == 0
  assert capfd.readouterr().err.count('trained with dispatch.capacity_factor=0.5') == 1


IDS = {
  'floats': (np.zeros((2, 3)), 'expected whole numbers [B, S], one or more, found float64 [2, 3]'),
  'one axis': (np.zeros(3, int), 'found int64 [3]'),
  'none': (np.zeros((0, 3), int), 'found int64 [0, 3]'),
  'too large': (
    np.array([[0, 79], [5, 80]]),
    'expected ids from 0 to 79, found 80 in row 1, column 1',
  ),
  'far too large': (np.array([[2**63]], np.uint64), f'found {2**63} in row 0, column 0'),
  'negative': (np.array([[0, -1]]), 'found -1 in row 0, column 1'),
  'objects': (np.array([[Evil()]], object), 'ids.npy: expected a .npy of token ids, found '),
}


@pytest.mark.parametrize('bad', [*IDS, 'archive', 'text', 'missing'])
def test_bad_ids_are_one_message_and_leave_nothing(
  bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
  monkeypatch.chdir(tmp_path)
  message = 'ids.npy: expected '
  if bad in IDS:
    ids, message = IDS[bad]
    np.save('ids.npy', ids)
  elif bad == 'archive':
    np.savez('ids.npz', a=np.zeros((1, 1), int))
    Path('ids.npz').rename('ids.npy')
  elif bad == 'text':
    Path('ids.npy').write_text('1 2 3')
  before = {*tmp_path.rglob('*')}
  assert run('logits', f'--model={GOLDEN / "mixtral"}', '--tokens=ids.npy', '--out=x.npy') == 2
  said = capfd.readouterr()
  assert message in said.err and 'Traceback' not in said.err and {*tmp_path.rglob('*')} == before


def test_logits_that_break_off_leave_nothing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(logits, 'whole_row_logits', lambda *args: check('no more'))
  np.save(tmp_path / 'ids.npy', np.zeros((1, 2), int))
  monkeypatch.chdir(tmp_path)
  assert run('logits', f'--model={GOLDEN / "llama"}', '--tokens=ids.npy', '--out=x.npy') == 2
  assert os.listdir(tmp_path) == ['ids.npy']
