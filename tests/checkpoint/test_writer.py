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

from moejax.checkpoint import manifest
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.writer import SaveFailed
from tests.checkpoint.saved_steps import DATA, read, state


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
