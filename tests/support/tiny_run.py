"""The smallest run that has everything: its config, and what it leaves.

Imports neither pytest nor what compiles: a trainer that a test starts imports this file for its
config. How such trainers are started is in trainer_process.py.
"""

import json
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
CLOCK = ('tokens_per_second', 'mfu', 'input_wait')  # metrics that cannot be the same twice

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
  # A sample compiles two more programs: tests of samples ask for one.
  eval=EvalConfig(every=4, batches=1, sample_tokens=0),
)


def config(workdir: Path, **changes: object) -> ExperimentConfig:
  """The config of a run in `workdir`, with its cache beside it; `a__b=1` changes the field a.b."""
  d = to_config_dict(CONFIG)
  places = {'workdir': str(workdir), 'data.cache_dir': str(workdir.parent / 'cache')}
  changed = {key.replace('__', '.'): value for key, value in changes.items()}
  d.update_from_flattened_dict(places | changed)
  return from_config_dict(ExperimentConfig, d)


def rows(workdir: Path) -> list[dict[str, object]]:
  """The lines of metrics.jsonl without what the clock says."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def final_digest(workdir: Path) -> str:
  """The digest of the last state, from report.json."""
  return json.loads((workdir / 'report.json').read_text())['digest']
