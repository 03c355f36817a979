"""Saves in flight: arrays may be donated, failures are raised once, a kill loses no whole step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

from moejax.checkpoint import manifest
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.reader import Damaged, read_leaves
from moejax.checkpoint.writer import SaveFailed
from moejax.sharding.tree import flatten
from tests.checkpoint.saved_steps import DATA, flip, largest, read, state, write


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
  step = jax.jit(lambda x: x * -3 + 1, donate_argnums=0)
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  want = manifest.digest({'x': x})
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, {'x': x}, DATA)
  for _ in range(5):
    x = step(x)
  checkpoints.close()
  _, back, _ = checkpoints.restore({'x': jax.ShapeDtypeStruct(x.shape, x.dtype)}, DATA)
  assert manifest.digest(back) == want


def test_a_failed_save_is_told_and_the_next_goes_well(
  root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=5))

  def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'rename', full)
  monkeypatch.setattr(Path, 'rename', full)
  checkpoints.save(4, state(4), DATA)
  with pytest.raises(SaveFailed, match='No space left'):
    checkpoints.check(wait=True)
  monkeypatch.undo()
  assert sorted(p.name for p in root.iterdir()) == ['1', '2', '3']
  checkpoints.check()  # told once
  checkpoints.save(5, state(5), DATA)
  checkpoints.close()
  assert read(root)[0] == 5


@pytest.mark.parametrize(
  'name', ['run[x]', '*?', 'a b', '%41', 'a#b?c=d&e', '~user', 'gs:', 'é', 'two\nlines', '"\'\\']
)
def test_any_legal_name_of_a_directory_is_saved_to_and_read_from(tmp_path: Path, name: str) -> None:
  checkpoints = Checkpoints(tmp_path / name / 'c', CheckpointConfig())
  checkpoints.save(1, state(1), DATA)
  checkpoints.close()
  assert (tmp_path / name / 'c' / '1' / 'state' / 'manifest.ocdbt').exists()
  assert read(tmp_path / name / 'c')[0] == 1
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_damage_below_a_name_with_wildcards_names_leaf_and_file(tmp_path: Path) -> None:
  root = tmp_path / 'run[x]'
  write(root, {1: 0.0}, CheckpointConfig())
  flipped = largest(root / '1' / 'state')
  flip(flipped)
  with pytest.raises(Damaged, match=rf'leaf .*, file state/\S*{flipped.name}: '):
    leaves = flatten(state())
    read_leaves(root / '1' / 'state', leaves, manifest.digests(state(1)))


@pytest.mark.parametrize('lost', ['index', 'leaf'])
def test_a_save_that_a_reader_would_not_find_has_failed(
  root: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=5))
  if lost == 'index':  # as where Orbax finds nothing to merge

    async def merge_nothing(*args: object, **kwargs: object) -> None:
      del args, kwargs

    monkeypatch.setattr(ocdbt_utils, 'merge_ocdbt_per_process_files', merge_nothing)
  else:
    monkeypatch.setattr('moejax.checkpoint.reader.chunk_ends', lambda directory: {'step': {}})
  checkpoints.save(4, state(4), DATA)
  with pytest.raises(SaveFailed, match={'index': 'missing', 'leaf': 'is not in the index'}[lost]):
    checkpoints.check(wait=True)
  monkeypatch.undo()
  assert checkpoints.steps.all() == [1, 2, 3]
  checkpoints.save(5, state(5), DATA)
  checkpoints.close()
  assert read(root)[0] == 5


WRITER = """
import sys
import jax.numpy as jnp
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.lock import hold_run_directory as lock
with lock(sys.argv[1]):
  checkpoints = Checkpoints(sys.argv[1] + '/c', CheckpointConfig(keep_latest=2))
  done = checkpoints.restore({'x': jnp.zeros((400, 1000))}, {})
  step = done[0] if done else 0
  assert not done or (done[1]['x'] == step).all()
  print('at', step, flush=True)
  while True:
    step += 1
    checkpoints.save(step, {'x': jnp.full((400, 1000), step, jnp.float32)}, {})
    print('saving', step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_time_the_newest_whole_step_is_there(tmp_path: Path) -> None:
  rng, last = np.random.default_rng(0), 0
  for _ in range(5):
    command = [sys.executable, '-c', WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
      at = int(run.stdout.readline().split()[1])
      assert at >= last - 1  # the one in flight may be lost, and none before it
      for _ in range(int(rng.integers(2, 6))):
        last = int(run.stdout.readline().split()[1])
      run.send_signal(signal.SIGKILL)
      last = max([last, *(int(line.split()[1]) for line in run.stdout)])
  checkpoints = Checkpoints(tmp_path / 'c', CheckpointConfig())
  assert checkpoints.restore({'x': jnp.zeros((400, 1000))}, {})[0] >= last - 1
  assert all(p.name.isdecimal() for p in (tmp_path / 'c').iterdir())
