"""Faults about files, by real processes: whatever happens to a run, the same command goes on, or says why it does not.

A fault that a run survives leaves the metrics and the last state that the run without it has, bit for bit.
"""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.checkpoints import Checkpoints
from moejax.checkpoint.lock import hold_run_directory
from moejax.config import ConfigError, frozendict
from moejax.data.pipeline import open_data
from moejax.data.sources import DataConfig
from moejax.data.token_cache import cached
from moejax.data.tokenizer import load_tokenizer
from moejax.hf.logits import token_ids
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.run_dir import open_run, read_config, read_setup, write_config
from moejax.train.initial_state import model_fingerprint
from moejax.train.shapes import make_run_mesh, sharded_state_shapes
from moejax.train.telemetry.routing_probe import Probes
from tests.checkpoint.test_checkpoints import Bomb, cut, flip, largest, zero
from tests.support.tiny_run import ROOT, config, final_digest, flags, rows, spawn, wait_for
from tests.system.test_processes import two

Record = Callable[[str, object], None]  # keeps a number for the table of `make faults`
ONE = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}  # device: a process starts faster
FEW = {
  'steps': 24,
  'log_every': 1,
  'checkpoint__every': 3,
  'checkpoint__keep_latest': 4,
  'eval__every': 8,
}


def go(workdir: Path, fault: str = '', **changes: object) -> tuple[int, str]:
  """Trains in a process of its own, with `fault`. -> exit status, all that it said."""
  process = spawn(flags(workdir, **FEW | changes), MOEJAX_FAULT=fault, **ONE)
  output = process.communicate(timeout=300)[0]
  return process.returncode, output


def steps(workdir: Path) -> list[str]:
  return sorted(
    (path.name for path in (workdir / 'checkpoints').iterdir()), key=lambda name: (len(name), name)
  )


@pytest.fixture(scope='module')
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run without any trouble. Tests work on copies."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  status, output = go(workdir)
  assert status == 0, output
  return workdir


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
  shutil.copytree(straight, tmp_path / 'run')
  return tmp_path / 'run'


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(
  straight: Path, tmp_path: Path
) -> None:
  """While a save is in flight, before it has its name, while an old step is deleted, and at five random steps."""
  workdir, kinds = tmp_path / 'run', []
  at_random = sorted(random.Random(0).sample(range(14, 25), 5))
  for fault in ('save:1', 'commit:1', 'delete:1', *(f'step:{step}' for step in at_random)):
    status, output = go(workdir, f'kill@{fault}', checkpoint__keep_latest=2)
    assert status == -signal.SIGKILL, output
    kinds += [name.partition('.')[2] for name in steps(workdir)]
  assert {'orbax-checkpoint-tmp', 'deleted'} <= {*kinds}  # it was hit where it hurts
  status, output = go(workdir, checkpoint__keep_latest=2)
  assert status == 0 and 'resuming after step ' in output, output
  assert rows(workdir) == rows(straight) and final_digest(workdir) == final_digest(straight)
  assert [name for name in steps(workdir) if not name.isdecimal()] == []


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
  few = FEW | {'steps': 45, 'checkpoint__keep_latest': 1}
  done = subprocess.run(
    [*mounting, 'sh', '-c', ON_A_SMALL_DISK, 'sh', disk, log, *flags(workdir, **few)],
    text=True,
    capture_output=True,
    env=os.environ | {'PYTHONPATH': str(ROOT)} | ONE,
  )
  output = log.read_text()
  assert done.returncode == 0 and 'done. ' in output, output
  said = [line for line in output.splitlines() if 'No space left on device' in line]
  failed = [row['step'] for row in rows(workdir) if 'saves_failed' in row]
  assert said == [
    f'save of step {step} failed, training goes on: {disk}/{step}: No space left on device'
    for step in failed
  ], output
  assert failed[0] == 3 and 'Traceback' not in output, output
  assert done.stdout.split() == ['45']  # saved, and no rubbish


@pytest.mark.slow
def test_a_save_that_fails_is_a_line_and_a_metric_and_the_last_one_a_status(
  straight: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / 'run'
  status, output = go(workdir, 'full@commit:2,full@commit:8')
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
  status, output = go(workdir)
  assert status == 0 and 'resuming after step 21 of' in output, output
  assert [row for row in rows(workdir) if 'saves_failed' not in row] == rows(straight)
  assert final_digest(workdir) == final_digest(straight)


@pytest.mark.slow
def test_where_one_process_cannot_save_none_has_saved_and_none_waits(tmp_path: Path) -> None:
  """The first fails at the end of two saves, the last among them, the second at the beginning of another."""
  with two(tmp_path / 'run', faults=('full@commit:1,full@commit:4', 'full@save:2')) as both:
    statuses, _ = both.wait()
    output = both.said()
  assert statuses == [1, 1] and 'Traceback' not in output, output
  failed = [
    line.split(': ')[0] for line in output.splitlines() if ' failed, training goes on: ' in line
  ]
  assert failed == [f'save of step {step} failed, training goes on' for step in (2, 4, 8)], output
  assert steps(tmp_path / 'run') == ['4', '6']


@pytest.mark.slow
def test_damage_is_named_and_the_newest_good_step_is_used(straight: Path, copy: Path) -> None:
  """A file missing, one cut short, one with another bit; beside them what is no checkpoint at all."""
  files = {}
  for step, harm in ((24, Path.unlink), (21, cut), (18, flip)):
    files[step] = largest(copy / 'checkpoints' / str(step) / 'state')
    harm(files[step])
  (copy / 'checkpoints' / '99').mkdir()
  (copy / 'checkpoints' / '77').symlink_to('15')
  status, output = go(copy)
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
  status, output = go(copy)
  assert status == 3 and 'none of [24, 21, 18, 15] loads; mend one, or move all away' in output, (
    output
  )
  assert {path: path.stat().st_mtime_ns for path in copy.rglob('*') if path.name != 'lock'} == {
    path: before[path] for path in before if path.name != 'lock'
  }


def refusal(cfg: ExperimentConfig) -> str:
  """Why a run with this config does not go on from the checkpoints in its directory; '' if it does."""
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
      3,
      'model/blocks/attention/k/w: float32[1, 32, 16] in the checkpoint, float32[2, ',
      '',
    ),
    (
      'model.moe.router.top_k',
      1,
      'model.moe.router.top_k: 2 in the checkpoint, 1 in the config',
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
  status, output = go(copy, seed=1)
  assert status == 2 and 'data seed: 0 in the checkpoint, 1 in the config' in output, output
  status, output = go(copy, seed=1, checkpoint__accept='seed', eval__batches=2)
  assert status == 0 and 'accepted: data seed: 0 in the checkpoint, 1 in the config' in output, (
    output
  )
  assert [line for line in output.splitlines() if line.startswith('changed since: ')] == [
    'changed since: seed 0 -> 1',
    "changed since: checkpoint.accept '' -> 'seed'",
    'changed since: eval.batches 1 -> 2',
  ]


def link(path: Path) -> None:
  """The file moves out of the directory, and a link leads to it."""
  path.rename(path.parent.parent / 'elsewhere')
  path.symlink_to('../elsewhere')


def evil(path: Path) -> None:
  path.write_bytes(pickle.dumps(Bomb(path.parent / 'run')))


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
@pytest.mark.parametrize(
  ('harm', 'says'),
  [
    (link, 'expected files inside it only'),
    (evil, ''),
    (cut, ''),
    (lambda path: path.write_text('["../x"]'), ''),
  ],
)
def test_what_a_reader_of_a_run_cannot_trust_is_one_error(
  tmp_path: Path, name: str, harm: Callable[[Path], None], says: str
) -> None:
  cfg = config(tmp_path / 'run')
  write_config(cfg)
  load_tokenizer('bytes').save(tmp_path / 'run' / 'tokenizer.json')
  assert read_setup(cfg.workdir)[1]
  harm(tmp_path / 'run' / name)
  with pytest.raises(ConfigError) as error:
    read_setup(cfg.workdir)
  assert (
    name in str(error.value)
    and says in str(error.value)
    and not (tmp_path / 'run' / 'run').exists()
  )


def test_a_link_in_the_place_of_a_file_to_be_written_keeps_its_target(tmp_path: Path) -> None:
  """Neither the lock nor the config, nor the token cache, writes over what a link leads to."""
  precious, workdir = tmp_path / 'precious', tmp_path / 'run'
  precious.write_text('mine')
  workdir.mkdir()
  for name in ('lock', 'config.json'):
    (workdir / name).symlink_to(precious)
  theirs = cached(tmp_path / 'elsewhere' / 'tokens', lambda: [b'theirs'])
  (workdir / 'tokens').symlink_to(tmp_path / 'elsewhere' / 'tokens')
  with (
    pytest.raises(ConfigError, match='name a directory that can be written to'),
    hold_run_directory(workdir),
  ):
    pass
  write_config(config(workdir))
  assert read_config(str(workdir)).steps == 12
  assert bytes(cached(workdir / 'tokens', lambda: [b'built'])) == b'built'
  assert precious.read_text() == 'mine' and not (workdir / 'tokens').is_symlink()
  assert bytes(cached(tmp_path / 'elsewhere' / 'tokens', lambda: [])) == bytes(theirs) == b'theirs'


def test_ids_and_probes_are_never_unpickled(tmp_path: Path) -> None:
  np.save(tmp_path / 'ids.npy', np.array([[Bomb(tmp_path / 'run')]]), allow_pickle=True)
  with pytest.raises(ConfigError, match='allow_pickle=False'):
    token_ids(str(tmp_path / 'ids.npy'), 9)
  np.savez(tmp_path / '4.npz', expert_ids=np.array([Bomb(tmp_path / 'run')]))
  assert not Probes(tmp_path, 8).steps(), 'taken for damaged'
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('workdir', 'says'), [('file', 'File exists'), ('file/run', 'Not a directory'), ('', '')]
)
def test_a_run_is_named_by_a_directory(tmp_path: Path, workdir: str, says: str) -> None:
  """The directory may lie anywhere; names that become a part of a path, as those of tasks, may not be paths."""
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ConfigError) as error:
    if workdir:
      with hold_run_directory(tmp_path / workdir):
        pass
    DataConfig(source='mixture', mixture=frozendict({'../../x': '1 kjv'}))
  assert says in str(error.value) and (workdir or "'../../x' is none; give another") in str(
    error.value
  )
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.slow
def test_a_second_trainer_is_turned_away_and_readers_are_not(tmp_path: Path) -> None:
  """The first saves and deletes all the time; whoever reads meanwhile ends with a whole step, and deletes nothing."""
  workdir = tmp_path / 'run'
  often = {
    'steps': 100_000,
    'checkpoint__every': 10,
    'checkpoint__keep_latest': 1,
    'eval__every': 0,
  }
  first = spawn(flags(workdir, **FEW | often), **ONE)
  wait_for(first, workdir, 30)
  try:
    status, output = go(workdir)
    assert (
      status == 5
      and f'workdir={workdir} is in use by process {first.pid}; stop it or name another' in output
    )
    found = [open_run(str(workdir))[2] for _ in range(3)]
    assert found == sorted(found) and found[0] < found[-1], found
    command = [
      sys.executable,
      '-m',
      'moejax.generate',
      f'--workdir={workdir}',
      '--prompt=ab',
      '--max_tokens=4',
    ]
    done = subprocess.run(
      command, env=os.environ | {'PYTHONPATH': str(ROOT)} | ONE, capture_output=True, text=True
    )
    assert (
      done.returncode == 0 and f' of {workdir}' in done.stderr and 'damaged' not in done.stderr
    ), done.stderr
  finally:
    first.kill()
    output = first.communicate()[0]
  assert 'failed' not in output, output


@pytest.mark.slow
def test_a_damaged_cache_is_made_again_and_damaged_text_is_named(tmp_path: Path) -> None:
  """Tokens with another bit, tokens cut short, a survey of zeros; then another text, and one that is no text."""
  workdir, cache, texts = tmp_path / 'run', tmp_path / 'cache', tmp_path / 'texts'
  texts.mkdir()
  for i in range(40):
    (texts / f'{i:02}.txt').write_text(f'{i} bottles of beer on the wall. ' * (20 + i))
    os.utime(texts / f'{i:02}.txt', (1, 1))
  source = {'data__source': 'text', 'data__path': f'{texts}/*.txt', 'steps': 6}
  status, output = go(workdir, **source, stop_after=3)
  assert status == 0, output
  for harm, file in zip((flip, cut), sorted(cache.glob('tokens-*')), strict=True):
    harm(file)
  status, output = go(workdir, **source)
  assert status == 0 and output.count('is damaged: building it anew') == 2, output
  (texts / '07.txt').write_text('Something else. ' * 30)
  status, output = go(workdir, **source)
  assert status == 2 and 'data source_digest: ' in output and 'in the config' in output, output
  (texts / '07.txt').write_bytes(b'\xff\xfe\xff')
  flip(next(iter(cache.glob('tokens-*'))))
  status, output = go(workdir, **source)
  assert status == 2 and f'{texts}/07.txt cannot be read as UTF-8 text' in output, output
