"""Which steps are kept, what counts as a step, and who removes what is none."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.steps import Steps, steps_to_keep
from tests.checkpoint.saved_steps import (
  DATA,
  state,
  write,
)


def test_latest_best_and_every_kth_stay(tmp_path: Path) -> None:
  metrics = {1: 5.0, 2: 1.0, 3: math.nan, 4: -math.inf, 5: 2.0, 6: math.inf, 7: 3.0}
  assert write(tmp_path, metrics, CheckpointConfig(keep_latest=2, keep_every=4)) == [2, 4, 6, 7]
  one = CheckpointConfig(keep_latest=1)
  assert write(tmp_path, {8: math.nan, 9: 4.0}, one) == [
    2,
    9,
  ]  # the best is still known after a restart
  assert write(tmp_path, {10: 0.5}, one) == [10]


def test_kept_for_random_metrics() -> None:
  assert steps_to_keep({1: 2.0, 2: 2.0, 3: 9.0}, latest=1, every=0, best=True) == {
    2,
    3,
  }  # of equals the later
  rng = np.random.default_rng(0)
  for _ in range(300):
    steps = sorted({int(s) for s in rng.integers(1, 40, rng.integers(0, 9))})
    metrics = {s: float(rng.choice([math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0])) for s in steps}
    latest, every, best = int(rng.integers(1, 4)), int(rng.integers(0, 5)), bool(rng.integers(2))
    stay = steps_to_keep(metrics, latest, every, best)
    rest = stay - set(steps[-latest:]) - {s for s in steps if every and s % every == 0}
    assert set(steps[-latest:]) <= stay <= set(steps) and len(rest) <= best
    finite = [m for m in metrics.values() if math.isfinite(m)]
    assert all(metrics[s] == min(finite) for s in rest)
    assert not (best and finite) or min(finite) in {metrics[s] for s in stay}


def test_a_step_deleted_while_steps_are_listed_is_not_foreign(
  root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  (root / '4').mkdir()
  there = Path.is_symlink

  def asked(path: Path) -> bool:
    """Just before it is asked what they hold, steps 1 to 3 are deleted, and nothing else is."""
    for step in (1, 2, 3):
      if path == root / f'{step}':
        path.rename(root / f'{step}.gone')
    return there(path)

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'is_symlink', asked)
    found = Steps(root, ('state', 'meta')).all()
  assert found == [] and len(caplog.records) == 1 and '/4 is' in caplog.text


def test_only_the_writer_takes_rubbish_away(root: Path) -> None:
  rubbish = [
    root / '4.orbax-checkpoint-tmp',
    root / '5.orbax-checkpoint-tmp-123',
    root / '1.deleted',
  ]
  for path in rubbish:
    shutil.copytree(root / '1', path)
  reader = Checkpoints(root, CheckpointConfig(), readonly=True)
  assert reader.restore(state(), DATA)[0] == 3 and all(p.exists() for p in rubbish)
  Checkpoints(root, CheckpointConfig())
  assert not any(p.exists() for p in rubbish)


def test_pruning_leaves_the_save_in_flight_alone(root: Path) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=1))
  flying = root / '9.orbax-checkpoint-tmp'
  flying.mkdir()
  checkpoints.check()
  assert checkpoints.steps.all() == [3] and flying.exists()
