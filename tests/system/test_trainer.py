"""The loop as a real process: it resumes to the bit, stops when told, and says with its exit status
how it ended."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.run_dir import read_config
from moejax.train.telemetry.tensorboard import TensorBoard
from moejax.train.trainer import train
from tests.support import tiny_run
from tests.support.tiny_run import ROOT, final_digest, rows
from tests.support.unoptimised import unoptimised

# They compare with, or go on from, one run: one worker takes them all.
pytestmark = pytest.mark.xdist_group('trainer')


def config(workdir: Path, **changes: object) -> ExperimentConfig:
  """The tiny run on one device, which is the quickest to compile for."""
  return tiny_run.config(workdir, **{'mesh__data': 1} | changes)


@pytest.fixture(scope='module', autouse=True)
def quickly() -> Iterator[None]:
  with unoptimised():
    yield


@pytest.fixture(scope='module')
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run without any trouble."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  assert train(config(workdir, eval__sample_tokens=8)) == 0
  return workdir


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
  logged = rows(straight)
  assert [row['step'] for row in logged if 'loss' in row] == [1, 2, 4, 6, 8, 10, 12]
  assert [row['step'] for row in logged if 'eval/bits_per_byte' in row] == [4, 8, 12]
  names = {
    'step',
    'lm_loss',
    'loss',
    'bits_per_byte',
    'balance/sequence',
    'max_vio',
    'grad_norm',
    'learning_rate',
  }
  assert names <= set(logged[0])
  first = json.loads((straight / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['tokens_per_second'] > 0 and first['input_wait'] > 0
  summary = json.loads((straight / 'summary.json').read_text())
  assert (
    summary['parameters']['active'] < summary['parameters']['total']
    and summary['tokens'] == 12 * 8 * 32
  )
  memory = summary['memory_per_device_bytes']
  assert memory['optimizer'] > 2 * memory['parameters'] > 0 and memory['temporaries'] > 0
  loads = [json.loads(line) for line in (straight / 'load.jsonl').read_text().splitlines()]
  assert all(np.sum(row['load']) == 8 * 32 * 2 for row in loads)
  assert read_config(str(straight)).steps == 12
  assert list((straight / 'tensorboard').iterdir()) and (straight / 'tokenizer.json').exists()


def test_tensorboard_holds_scalars_pictures_and_text(straight: Path) -> None:
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(straight / 'tensorboard'), size_guidance={'tensors': 0, 'images': 0})
  board.Reload()
  assert {'lm_loss', 'max_vio', 'eval/bits_per_byte'} <= {
    *board.Tags()['scalars'],
    *board.Tags()['tensors'],
  }
  assert 'expert_load/layer_0' in {*board.Tags()['images'], *board.Tags()['tensors']}
  assert 'sample' in board.Tags()['tensors']
  assert (
    TensorBoard.__module__ == 'moejax.train.telemetry.tensorboard'
    and 'tensorflow' not in sys.modules
  )


@pytest.mark.slow
def test_stopping_and_resuming_changes_no_bit(straight: Path, tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  assert train(config(workdir, stop_after=6)) == 0
  assert [row['step'] for row in rows(workdir) if 'loss' in row][-1] == 6
  assert train(config(workdir)) == 0
  assert [row for row in rows(workdir)] == rows(straight)
  assert final_digest(workdir) == final_digest(straight)


def test_a_finished_run_says_so_again(straight: Path, capsys: pytest.CaptureFixture) -> None:
  before, digest = rows(straight), final_digest(straight)
  assert train(config(straight)) == 0
  assert 'bits per byte' in capsys.readouterr().out
  assert rows(straight) == before and final_digest(straight) == digest


def test_other_data_on_resume_is_refused_naming_both(
  straight: Path, capsys: pytest.CaptureFixture
) -> None:
  assert train(config(straight, seed=1)) == 2
  assert 'seed: 0 in the checkpoint, 1 in the config' in capsys.readouterr().err


@pytest.mark.parametrize(
  'changes,told',
  [
    ({'steps': 5}, 'steps=5 is below step 12, which {} has reached: use 12 or more, or a new'),
    ({'model__d_model': 64}, 'model.d_model: 32 in the checkpoint, 64 in the config'),
  ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_compiled(
  straight: Path,
  changes: dict[str, object],
  told: str,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  monkeypatch.setattr('moejax.train.trainer.compile_programs', pytest.fail)
  before = (straight / 'config.json').read_text()
  assert train(config(straight, **changes)) == 2
  assert told.format(straight) in capsys.readouterr().err
  assert (straight / 'config.json').read_text() == before


@pytest.mark.slow
def test_damage_is_left_for_the_restore_to_find(straight: Path, tmp_path: Path) -> None:
  shutil.copytree(straight, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '12' / 'meta' / 'metadata').write_text('{')
  assert train(config(tmp_path / 'run')) == 0
  assert final_digest(tmp_path / 'run') == final_digest(straight)


def test_a_disk_that_is_full_before_the_first_step_is_one_line(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, 'No space left on device', str(tmp_path / 'tokens'))

  monkeypatch.setattr('moejax.train.text_position.open_data', full)
  assert train(config(tmp_path / 'run')) == 1
  assert capsys.readouterr().err == (
    f"moejax.train: [Errno 28] No space left on device: '{tmp_path / 'tokens'}': make room or mend "
    'the disk, and give the same command again\n'
  )
  monkeypatch.setattr('moejax.train.text_position.open_data', lambda *args, **kwargs: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    train(config(tmp_path / 'run'))


@pytest.mark.slow
def test_another_batch_size_goes_on_after_the_rows_seen(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  workdir = tmp_path / 'run'
  assert train(config(workdir, stop_after=2)) == 0
  assert train(config(workdir, stop_after=4, batch_size=4, checkpoint__accept='batch')) == 0
  assert 'the text goes on after the 16 rows that were seen' in capsys.readouterr().out
  again = config(workdir, stop_after=6, batch_size=2, checkpoint__accept='batch')
  assert train(again) == 0
  assert 'the text goes on after the 24 rows that were seen' in capsys.readouterr().out
  assert json.loads((workdir / 'batches.json').read_text())['stretches'] == [
    {'first_step': step, 'batch_size': size, 'seq_len': 32}
    for step, size in ((0, 8), (2, 4), (4, 2))
  ]
  assert train(again) == 0
  assert 'the text goes on' not in capsys.readouterr().out


def test_a_vocabulary_too_small_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  assert train(config(tmp_path / 'run', model__vocab_size=100)) == 2
  assert 'vocab_size=100 is less than the 257 tokens' in capsys.readouterr().err


def test_rows_that_do_not_divide_over_devices_are_refused(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  assert train(config(tmp_path / 'run', batch_size=6, mesh__data=8)) == 2
  assert 'do not divide over data * fsdp * expert = 8' in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_can_start_from_anothers_model(
  straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  workdir = tmp_path / 'run'
  assert train(config(workdir, init_from=str(straight), stop_after=2)) == 0
  first, last = rows(workdir)[0], [row for row in rows(straight) if 'lm_loss' in row][-1]
  assert (
    first['lm_loss'] < last['lm_loss'] + 0.05
    and first['learning_rate'] == rows(straight)[0]['learning_rate']
  )
  capsys.readouterr()
  assert train(config(tmp_path / 'other', init_from=str(straight), model__d_model=64)) == 2
  assert 'model.d_model=64 here, 32 there' in capsys.readouterr().err
  assert train(config(tmp_path / 'none', init_from=str(tmp_path / 'nowhere'))) == 2
  assert 'nowhere' in capsys.readouterr().err


@pytest.mark.slow
def test_generate_reads_the_run_of_another_process(straight: Path) -> None:
  command = [
    sys.executable,
    '-m',
    'moejax.generate',
    f'--workdir={straight}',
    '--prompt=ab',
    '--max_tokens=8',
  ]
  done = subprocess.run(
    command, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stdout.startswith('ab'), done.stderr
  assert f'step 12 of {straight}' in done.stderr
