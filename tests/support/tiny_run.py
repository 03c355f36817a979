"""The smallest run that has everything: its config, the command that trains it, and what it leaves.

Imports no pytest: a trainer that a test starts imports this file for its config.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from moejax.checkpoint.checkpoints import CheckpointConfig
from moejax.config import from_config_dict, frozendict, to_config_dict
from moejax.data.sources import DataConfig
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import EvalConfig, ExperimentConfig
from moejax.train.optimizer import OptimConfig

ROOT = Path(__file__).parents[2]
CLOCK = ('tokens_per_second', 'mfu')  # what cannot be the same twice

CONFIG = ExperimentConfig(
  steps=12,
  batch_size=8,
  seq_len=32,
  log_every=2,
  data=DataConfig(source='synthetic', tokenizer='bytes', synthetic_tokens=20_000),
  model=ModelConfig(
    d_model=32,
    num_layers=2,
    num_dense_layers=1,
    d_ff=32,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=16),
    moe=MoEConfig(router=RouterConfig(num_experts=4, top_k=2), d_expert=16),
  ),
  balance=BalanceConfig(losses=frozendict(sequence=0.01), bias_rule='sign'),
  optim=OptimConfig(warmup_steps=2),
  checkpoint=CheckpointConfig(every=4),
  eval=EvalConfig(every=4, batches=1),
)


def config(workdir: Path, **changes: object) -> ExperimentConfig:
  d = to_config_dict(CONFIG)
  d.update_from_flattened_dict(
    {'workdir': str(workdir), 'data.cache_dir': str(workdir.parent / 'cache')}
    | {key.replace('__', '.'): value for key, value in changes.items()}
  )
  return from_config_dict(ExperimentConfig, d)


def flags(workdir: Path, **changes: object) -> list[str]:
  """The command line of `config(...)` as a process of its own."""
  file = workdir.parent / 'config.py'
  file.write_text(
    'from tests.support.tiny_run import CONFIG\nfrom moejax.config import to_config_dict\n'
    'def get_config():\n  return to_config_dict(CONFIG)\n'
  )
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={file}',
    f'--workdir={workdir}',
    f'--config.data.cache_dir={workdir.parent / "cache"}',
    *(f'--config.{key.replace("__", ".")}={value}' for key, value in changes.items()),
  ]


def spawn(command: list[str], **env: str) -> subprocess.Popen:
  return subprocess.Popen(
    command,
    env=os.environ | {'PYTHONPATH': str(ROOT)} | env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def rows(workdir: Path) -> list[dict[str, object]]:
  """metrics.jsonl without what the clock says."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def final_digest(workdir: Path) -> str:
  return json.loads((workdir / 'report.json').read_text())['digest']


def wait_for(process: subprocess.Popen, workdir: Path, step: int) -> None:
  """Until metrics.jsonl holds a line of that step."""
  file = workdir / 'metrics.jsonl'
  for _ in range(6000):
    if file.exists() and any(
      json.loads(line)['step'] >= step
      for line in file.read_text().splitlines(True)
      if line.endswith('\n')
    ):
      return
    if process.poll() is not None:
      break
    time.sleep(0.05)
  output = process.communicate()[0] if process.poll() is not None else 'still running'
  raise AssertionError(f'no line of step {step}:\n{output}')
