"""A directory of checkpoints, for the tests of this folder."""

import math
from pathlib import Path

import pytest

from moejax.checkpoint.checkpoints import CheckpointConfig
from tests.checkpoint.saved_steps import write


@pytest.fixture
def root(tmp_path: Path) -> Path:
  """Steps 1, 2 and 3, each saved from state(step)."""
  write(tmp_path / 'c', {1: math.inf, 2: math.inf, 3: math.inf}, CheckpointConfig(keep_latest=3))
  return tmp_path / 'c'
