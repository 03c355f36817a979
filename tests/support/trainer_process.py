"""Trainers as real processes: their command, how they compile, and waiting for what they log.

XLA optimises nothing in them: that is a third to a half of the time of a cold start, and what these
tests look at, files, signals and exit statuses, is the same.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.quick import QUICK
from tests.support.tiny_run import ROOT

PATIENCE = 300  # seconds for something that takes a few, on a machine that does much else


def xla_flags(devices: int = 1) -> str:
  """XLA_FLAGS of so many virtual devices, and of programs that are quickly compiled."""
  options = ' '.join(f'--{name}={value}' for name, value in QUICK.items())
  return f'--xla_force_host_platform_device_count={devices} {options}'.replace('False', 'false')


def train_command(workdir: Path, **changes: object) -> list[str]:
  """The command line that trains `config(workdir, **changes)` of tiny_run.py.

  The config is a file of its own that imports tiny_run.py, as an experiment of a user would be.
  """
  file = workdir.parent / 'config.py'
  file.write_text(
    'from tests.support.tiny_run import CONFIG\nfrom moejax.config import to_config_dict\n'
    'def get_config():\n  return to_config_dict(CONFIG)\n'
  )
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in changes.items()]
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={file}',
    f'--workdir={workdir}',
    f'--config.data.cache_dir={workdir.parent / "cache"}',
    *flags,
  ]


def environment(**env: str) -> dict[str, str]:
  """The environment of a process of one device that finds the tests' own modules."""
  return os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': xla_flags()} | env


def spawn(command: list[str], **env: str) -> subprocess.Popen:
  """Starts a command on one device; what it says on either stream is read as one text."""
  return subprocess.Popen(
    command,
    env=environment(**env),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def logged_steps(workdir: Path) -> list[int]:
  """The step of every whole line of metrics.jsonl; the last line may be half written."""
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  return [json.loads(line)['step'] for line in lines if line.endswith('\n')]


def wait_for(process: subprocess.Popen, workdir: Path, step: int) -> None:
  """Returns once metrics.jsonl holds a line of that step, or of a later one."""
  end = time.monotonic() + PATIENCE
  while time.monotonic() < end:
    if max(logged_steps(workdir), default=0) >= step:
      return
    if process.poll() is not None:
      break
    time.sleep(0.05)
  output = process.communicate()[0] if process.poll() is not None else 'still running'
  raise AssertionError(f'no line of step {step}:\n{output}')


# What a trainer does with files and signals does not depend on how many layers it traces.
ONE_LAYER = {'model__num_layers': 1, 'model__num_dense_layers': 0}
# A short run with many saves. Only `steps` is part of the compiled programs: all tests share them.
FEW = {
  **ONE_LAYER,
  'steps': 24,
  'log_every': 1,
  'checkpoint__every': 3,
  'checkpoint__keep_latest': 4,
  'eval__every': 8,
}


class Ended(NamedTuple):
  """How a trainer ended."""

  status: int
  output: str


def run_to_end(workdir: Path, fault: str = '', **changes: object) -> Ended:
  """Trains the short run in a process of its own, with a fault in the words of MOEJAX_FAULT."""
  process = spawn(train_command(workdir, **FEW | changes), MOEJAX_FAULT=fault)
  output = process.communicate(timeout=PATIENCE)[0]
  return Ended(process.returncode, output)
