"""One run on two processes of four devices each, over loopback: as on one, whatever becomes of
either."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.lock import hold_run_directory
from moejax.data.pipeline import open_data
from moejax.hf.import_model import import_model
from moejax.train.trainer import train
from tests.hf.commands import assert_same_files
from tests.support.published_models import copied
from tests.support.tiny_run import config, rows
from tests.support.two_processes import CHANGES, HEARTBEAT, by_slurm, two
from tests.support.unoptimised import unoptimised

# Drawing a sample on two processes is looked at once: it compiles two more programs.
SAMPLED = '--config.eval.sample_tokens=8'

# Two runs of twenty seconds are shared by most of the tests: one worker takes them all.
pytestmark = pytest.mark.xdist_group('two processes')


@pytest.fixture(scope='module', autouse=True)
def quickly() -> Iterator[None]:
  """What this process trains itself it compiles as the real processes do."""
  with unoptimised():
    yield


def meta(workdir: Path, step: int) -> dict[str, object]:
  return json.loads((workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())['meta']


def cut_after(workdir: Path, step: int, to: Path) -> Path:
  """A copy of a run directory in which nothing was saved after that step."""
  shutil.copytree(workdir, to)
  for path in (to / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return to


def assert_close(found: list[dict[str, object]], wanted: list[dict[str, object]]) -> None:
  """The same lines with the same names; losses and loads to the order of sums."""
  assert [(row['step'], sorted(row)) for row in found] == [
    (row['step'], sorted(row)) for row in wanted
  ]
  for one, other in zip(found, wanted):
    for name in (
      'loss',
      'lm_loss',
      'balance/sequence',
      'grad_norm',
      'max_vio',
      'eval/lm_loss',
      'eval/max_vio',
      'eval/bits_per_byte_low',
      'eval/bits_per_byte_high',
    ):
      if name in one:
        np.testing.assert_allclose(
          one[name], other[name], rtol=1e-5, err_msg=f'{name} of step {one["step"]}'
        )


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Two processes, undisturbed."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  with two(workdir, more=[[SAMPLED]] * 2) as both:
    statuses, _ = both.wait()
    assert statuses == [0, 0] and 'it writes:' in both.output(), both.output()
    said = both.logs[1].read_text()
    assert 'step' not in said and 'digest' not in said, said  # only the first process speaks
  return workdir


@pytest.fixture(scope='module')
def alone(whole: Path) -> Path:
  """The same run in one process of eight devices."""
  workdir = whole.parent / 'alone'
  assert train(config(workdir, **CHANGES, eval__sample_tokens=8)) == 0
  return workdir


def file_names(run: Path) -> list[str]:
  """Every file of a run directory but those of checkpoints and of TensorBoard."""
  paths = [str(path.relative_to(run)) for path in run.rglob('*')]
  return sorted(path for path in paths if not path.startswith(('checkpoints/', 'tensorboard/')))


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(whole: Path, alone: Path) -> None:
  assert_close(rows(whole), rows(alone))
  assert file_names(whole) == file_names(alone)
  steps = [sorted(path.name for path in (run / 'checkpoints').iterdir()) for run in (whole, alone)]
  assert steps[0] == steps[1] == ['4', '6', '8']
  assert meta(whole, 4)['fingerprint'] == meta(alone, 4)['fingerprint']
  config_of_one = (alone / 'config.json').read_text().replace('alone', 'run')
  assert (whole / 'config.json').read_text() == config_of_one
  assert (
    json.loads((whole / 'summary.json').read_text())['mesh']
    == json.loads((alone / 'summary.json').read_text())['mesh']
  )


@pytest.mark.slow
def test_a_run_of_two_goes_on_in_one(whole: Path, alone: Path) -> None:
  workdir = cut_after(whole, 4, whole.parent / 'gathered')
  assert train(config(workdir, **CHANGES)) == 0  # which verifies the digests of what it read
  assert_close(rows(workdir), rows(alone))
  assert rows(workdir)[:4] == rows(whole)[:4]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(alone: Path) -> None:
  """Also: a run of one process goes on in two, which Slurm started."""
  workdir = cut_after(alone, 4, alone.parent / 'stopped')
  with two(workdir, faults=('', 'term@step:5'), launch=by_slurm) as both:
    statuses, _ = both.wait()
    said = both.output()
  assert statuses == [128 + signal.SIGTERM] * 2, said
  assert 'resuming after step 4 ' in said
  stopped = int(said.split(' after step ')[-1].split()[0])
  assert 5 <= stopped <= 7 and sorted(os.listdir(workdir / 'checkpoints'))[-1] == str(stopped)
  last = [row for row in rows(workdir) if 'loss' in row]
  assert last[-1]['step'] == stopped
  assert_close(last, [row for row in rows(alone) if 'loss' in row][:stopped])


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_the_same_command_goes_on(whole: Path) -> None:
  """The second process is killed, then nobody is in the way."""
  workdir = whole.parent / 'killed'
  with two(workdir, faults=('', 'kill@step:5')) as both:
    statuses, ends = both.wait()
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0, both.output()
    assert ends[0] - ends[1] < HEARTBEAT + 5
  with two(workdir, more=[['--config.stop_after=6']] * 2) as both:
    statuses, _ = both.wait()
    assert statuses == [0, 0] and 'resuming after step ' in both.output(), both.output()
  assert rows(workdir) == rows(whole)[:6]
  assert meta(workdir, 6)['digests'] == meta(whole, 6)['digests']


@pytest.mark.slow
def test_what_one_is_refused_all_are_refused(tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  with hold_run_directory(workdir), two(workdir) as both:
    statuses, _ = both.wait()
    assert statuses == [5, 5] and f'in use by process {os.getpid()}' in both.output(), both.output()
  with two(workdir, more=((), ['--config.seed=1'])) as both:
    statuses, _ = both.wait()
    assert (
      statuses == [2, 2] and 'the config of process 1 is not that of process 0' in both.output()
    ), both.output()


@pytest.mark.slow
def test_two_processes_import_and_export_what_one_does(tmp_path: Path) -> None:
  """Each reads what its devices hold, and writes some of the shards; digests are the same."""
  source = copied('mixtral', tmp_path / 'source')
  places = [str(tmp_path / name) for name in ('source', 'both', 'out')]
  command = [sys.executable, '-m', 'tests.support.hf_process', *places]
  with two(tmp_path / 'both', command=command) as both:
    statuses, _ = both.wait()
  said = [log.read_text() for log in both.logs]
  assert statuses == [0, 0], both.output()
  assert 'imported ' in said[0] and 'exported step 0 of ' in said[0]
  assert 'ported ' not in said[1] and 'reading' not in said[1], said[1]
  import_model(places[0], str(tmp_path / 'alone'))
  assert meta(tmp_path / 'both', 0)['digests'] == meta(tmp_path / 'alone', 0)['digests']
  assert file_names(tmp_path / 'both') == file_names(tmp_path / 'alone')
  assert len([*(tmp_path / 'out').glob('*.safetensors')]) > 2
  assert_same_files(source, tmp_path / 'out')
  assert not [*tmp_path.glob('*partial*')]


def test_a_batch_is_read_in_rows(tmp_path: Path) -> None:
  """The parts that processes read are the batch, bit for bit; so are those of the held-out text,
  padding included."""
  cfg = config(tmp_path / 'run')
  data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=cfg.seed)
  parts = (0, 1, 6, 7), (2, 3, 4, 5)
  held = [list(data.validation(0, part)) for part in ((), *parts)]
  assert len(held[0]) == len(held[1]) > 1 and not held[0][-1].mask[-1].any()
  for whole, *cut in [
    *zip(*held),
    *((data.batch(i), *(data.batch(i, part) for part in parts)) for i in (0, 1, 77)),
  ]:
    for field, *pieces in zip(whole, *cut):
      for part, piece in zip(parts, pieces):
        np.testing.assert_array_equal(field[list(part)], piece)
        assert field.dtype == piece.dtype
