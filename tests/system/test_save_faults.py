"""Faults about saves, by real processes: whatever happens to a run, the same command goes on, or
says why it does not.

A fault that a run survives leaves the metrics and the last state of the run without it, bit for
bit.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from moejax.checkpoint.checkpoints import Checkpoints
from moejax.config import ConfigError
from moejax.data.pipeline import open_data
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.initial_state import model_fingerprint
from moejax.train.shapes import make_run_mesh, sharded_state_shapes
from tests.checkpoint.test_checkpoints import cut, flip, largest, zero
from tests.support.tiny_run import config, final_digest, rows
from tests.support.trainer_process import FEW, environment, run_to_end, train_command
from tests.support.two_processes import two

# Most tests go on from, or compare with, one run: one worker takes them all.
pytestmark = pytest.mark.xdist_group('save faults')


def steps(workdir: Path) -> list[str]:
  return sorted(
    (path.name for path in (workdir / 'checkpoints').iterdir()), key=lambda name: (len(name), name)
  )


@pytest.fixture(scope='module')
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run without any trouble. Tests work on copies."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  status, output = run_to_end(workdir)
  assert status == 0, output
  return workdir


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
  shutil.copytree(straight, tmp_path / 'run')
  return tmp_path / 'run'


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=2m none "$1" && head -c 1900k /dev/zero > "$1/filler" || exit 9
(until grep -qs "failed, training goes on" "$2"; do sleep 0.02; done; rm "$1/filler") &
disk="$1"; log="$2"; shift 2
"$@" > "$log" 2>&1; status=$?
ls "$disk"; exit $status
"""


@pytest.mark.slow
def test_a_full_disk_fails_saves_until_there_is_room(tmp_path: Path) -> None:
  """A real one, of 2 MB, on which somebody makes room after the first save that failed."""
  disk, log, workdir = tmp_path / 'run' / 'checkpoints', tmp_path / 'log', tmp_path / 'run'
  disk.mkdir(parents=True)
  mounting = ['unshare', '--user', '--map-root-user', '--mount']
  if subprocess.run(
    [*mounting, 'mount', '-t', 'tmpfs', 'none', disk], capture_output=True
  ).returncode:
    pytest.skip('nobody may mount a disk here; full@commit stands for it in the test below')
  few = FEW | {'checkpoint__every': 1, 'checkpoint__keep_latest': 1}
  done = subprocess.run(
    [*mounting, 'sh', '-c', ON_A_SMALL_DISK, 'sh', disk, log, *train_command(workdir, **few)],
    text=True,
    capture_output=True,
    env=environment(),
  )
  output = log.read_text()
  assert done.returncode == 0 and 'done. ' in output, output
  said = [line for line in output.splitlines() if 'No space left on device' in line]
  failed = [row['step'] for row in rows(workdir) if 'saves_failed' in row]
  assert said == [
    f'save of step {step} failed, training goes on: {disk}/{step}: No space left on device'
    for step in failed
  ], output
  assert failed[0] == 1 and 'Traceback' not in output, output
  assert done.stdout.split() == ['24']  # saved, and no rubbish


@pytest.mark.slow
def test_a_save_that_fails_is_a_line_and_a_metric_and_the_last_one_a_status(
  straight: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / 'run'
  status, output = run_to_end(workdir, 'full@commit:2,full@commit:8')
  assert status == 1, output
  assert (
    'save of step 6 failed, training goes on: ' in output and 'No space left on device' in output
  )
  assert (
    f'the last save failed: give the same command again when {workdir} can be written to' in output
  )
  assert 'Traceback' not in output and steps(workdir) == ['12', '15', '18', '21']
  assert [(row['step'], row['saves_failed']) for row in rows(workdir) if 'saves_failed' in row] == [
    (6, 1),
    (24, 1),
  ]
  status, output = run_to_end(workdir)
  assert status == 0 and 'resuming after step 21 of' in output, output
  assert [row for row in rows(workdir) if 'saves_failed' not in row] == rows(straight)
  assert final_digest(workdir) == final_digest(straight)


@pytest.mark.slow
def test_where_one_process_cannot_save_none_has_saved_and_none_waits(tmp_path: Path) -> None:
  """The first fails at the end of two saves, the last among them, the second at the beginning of
  another."""
  with two(tmp_path / 'run', faults=('full@commit:1,full@commit:4', 'full@save:2')) as both:
    statuses, _ = both.wait()
    output = both.output()
  assert statuses == [1, 1] and 'Traceback' not in output, output
  failed = [
    line.split(': ')[0] for line in output.splitlines() if ' failed, training goes on: ' in line
  ]
  assert failed == [f'save of step {step} failed, training goes on' for step in (2, 4, 8)], output
  assert steps(tmp_path / 'run') == ['4', '6']


@pytest.mark.slow
def test_damage_is_named_and_the_newest_good_step_is_used(straight: Path, copy: Path) -> None:
  """A file missing, one cut short, one with another bit; beside them what is no checkpoint at
  all."""
  files = {}
  for step, harm in ((24, Path.unlink), (21, cut), (18, flip)):
    files[step] = largest(copy / 'checkpoints' / str(step) / 'state')
    harm(files[step])
  (copy / 'checkpoints' / '99').mkdir()
  (copy / 'checkpoints' / '77').symlink_to('15')
  status, output = run_to_end(copy)
  assert status == 0 and 'resuming after step 15 of' in output, output
  for step, file in files.items():
    [line] = [line for line in output.splitlines() if f'checkpoint {step} is damaged' in line]
    assert (
      f', file {file.relative_to(copy / "checkpoints" / str(step))}: ' in line and ': leaf ' in line
    ), line
  assert sum('is not a checkpoint: ignored' in line for line in output.splitlines()) == 2
  assert rows(copy) == rows(straight) and final_digest(copy) == final_digest(straight)


@pytest.mark.slow
def test_without_a_good_step_a_run_is_not_started_over(copy: Path) -> None:
  for file in (copy / 'checkpoints').rglob('*'):
    if file.is_file():
      zero(file)
  before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
  status, output = run_to_end(copy)
  assert status == 3 and 'none of [24, 21, 18, 15] loads; mend one, or move all away' in output, (
    output
  )
  assert {path: path.stat().st_mtime_ns for path in copy.rglob('*') if path.name != 'lock'} == {
    path: before[path] for path in before if path.name != 'lock'
  }


def refusal(cfg: ExperimentConfig) -> str:
  """Why a run with this config does not go on from the checkpoints in its directory; '' if it
  does."""
  data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=cfg.seed)
  cfg = with_vocabulary(cfg, data.vocab_size)
  checkpoints = Checkpoints(Path(cfg.workdir) / 'checkpoints', cfg.checkpoint, readonly=True)
  try:
    checkpoints.restore(
      sharded_state_shapes(cfg, make_run_mesh(cfg)), data.fingerprint | model_fingerprint(cfg.model)
    )
  except ConfigError as error:
    return str(error)
  return ''


@pytest.mark.slow
@pytest.mark.parametrize(
  ('field', 'value', 'line', 'accept'),
  [
    ('model.d_model', 16, 'model.d_model: 32 in the checkpoint, 16 in the config', ''),
    (
      'model.num_layers',
      2,
      'model/blocks/attention/k/w: float32[1, 32, 16] in the checkpoint, float32[2, ',
      '',
    ),
    (
      'model.moe.router.top_k',
      3,
      'model.moe.router.top_k: 2 in the checkpoint, 3 in the config',
      'model',
    ),
    (
      'model.dtype',
      'bfloat16',
      "model.dtype: 'float32' in the checkpoint, 'bfloat16' in the config",
      'model',
    ),
    ('data.synthetic_seed', 1, 'data source_digest: ', 'data'),
    (
      'data.tokenizer',
      'bpe:257',
      'data tokenizer: bytes in the checkpoint, bpe:257 in the config',
      'tokenizer',
    ),
    ('batch_size', 16, 'data batch_size: 8 in the checkpoint, 16 in the config', 'batch'),
    ('seq_len', 16, 'data seq_len: 32 in the checkpoint, 16 in the config', 'batch'),
    ('seed', 1, 'data seed: 0 in the checkpoint, 1 in the config', 'seed'),
  ],
)
def test_what_is_not_as_in_the_checkpoint_is_refused(
  straight: Path, field: str, value: object, line: str, accept: str
) -> None:
  there = {**FEW, field.replace('.', '__'): value}
  assert refusal(config(straight, **FEW)) == ''
  told = refusal(config(straight, **there))
  assert line in told and f'{straight}/checkpoints/24: another config' in told, told
  assert accept or 'give it or a new workdir\n' in told
  if accept:
    assert f'--config.checkpoint.accept={accept} to go on all the same' in told
    assert refusal(config(straight, **there, checkpoint__accept=accept)) == ''


@pytest.mark.slow
def test_another_seed_is_refused_and_accepted_when_asked_for(copy: Path) -> None:
  (copy / 'checkpoints' / '24').rename(copy.parent / '24')
  status, output = run_to_end(copy, seed=1)
  assert status == 2 and 'data seed: 0 in the checkpoint, 1 in the config' in output, output
  status, output = run_to_end(copy, seed=1, checkpoint__accept='seed', eval__batches=2)
  assert status == 0 and 'accepted: data seed: 0 in the checkpoint, 1 in the config' in output, (
    output
  )
  assert [line for line in output.splitlines() if line.startswith('changed since: ')] == [
    'changed since: seed 0 -> 1',
    "changed since: checkpoint.accept '' -> 'seed'",
    'changed since: eval.batches 1 -> 2',
  ]
