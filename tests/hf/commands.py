"""The commands of moejax.hf as tests run them, and models to run them on."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.config.flags import parse_flags
from moejax.data.sources import DataConfig
from moejax.data.tokenizer import load_tokenizer
from moejax.families import FAMILIES
from moejax.hf.__main__ import main
from moejax.hf.safetensors.directory import open_tensors
from moejax.model.config import ModelConfig
from moejax.train.experiment.config import DEFAULT_CONFIG, ExperimentConfig
from moejax.train.experiment.run_dir import CHECKPOINTS, write_config
from moejax.train.step.train_state import init_state
from tests.support.published_models import random_model, written


def run(*args: object) -> int:
  return main([str(arg) for arg in args])


def imported(source: Path, out: Path, *flags: str) -> Path:
  assert run('import', source, f'--out={out}', *flags) == 0
  return out


def assert_same_files(one: Path, other: Path) -> None:
  """Every tensor to the byte, and every key of every JSON file that is not of the shards."""
  a, b = open_tensors(one), open_tensors(other)
  assert {*a.names} == {*b.names}
  for name in a.names:
    assert (a.dtype(name), a.read(name).tobytes()) == (b.dtype(name), b.read(name).tobytes()), name
  for name in ('config.json', 'generation_config.json'):
    assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


def with_text(directory: Path, **changes: object) -> Path:
  """A random model of bytes, with their tokenizer."""
  config, arrays = random_model('deepseek_v3', 'BF16', vocab_size=260, **changes)
  written(directory, arrays, config)
  load_tokenizer('bytes').save(directory / 'tokenizer.json')
  (directory / 'generation_config.json').write_text('{"eos_token_id": 2, "top_p": 0.9}')
  return directory


def trained_here(path: Path, kind: str, **changes: object) -> tuple[ModelConfig, dict[str, object]]:
  """A run of a family's tiny preset, changed; see `run_without_training`."""
  model = dataclasses.replace(FAMILIES[kind].presets['tiny'], vocab_size=0, **changes)
  cfg = ExperimentConfig(workdir=str(path), data=DataConfig(tokenizer='bytes'), model=model)
  return run_without_training(cfg)


def run_without_training(cfg: ExperimentConfig) -> tuple[ModelConfig, dict[str, object]]:
  """Leaves a run directory as the trainer does: its text is bytes, and its numbers are random.

  Returns the model's config, its vocabulary filled in, and the state that was saved.
  """
  path = Path(cfg.workdir)
  write_config(cfg)
  tokenizer = load_tokenizer('bytes')
  tokenizer.save(path / 'tokenizer.json')
  full = dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, vocab_size=tokenizer.vocab_size)
  )
  shapes, rng = jax.eval_shape(functools.partial(init_state, full)), np.random.default_rng(0)
  state = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)),
    {'model': shapes.model, 'router': shapes.router},
  )
  writer = Checkpoints(path / CHECKPOINTS, CheckpointConfig())
  writer.save(3, state, {})
  writer.close()
  return full.model, state


def tiny_run(path: Path) -> Path:
  """What `make train` leaves: of configs/tiny.py with two narrow layers, and without training."""
  changes = {'d_model': 32, 'num_layers': 2, 'moe.d_expert': 16, 'attention.d_head': 8}
  flags = [f'--config.model.{name}={value}' for name, value in changes.items()]
  argv = ['--config=tiny', f'--workdir={path}', '--config.data.tokenizer=bytes', *flags]
  run_without_training(parse_flags(argv, ExperimentConfig, DEFAULT_CONFIG))
  return path


class Evil:
  """Unpickled, it would leave a file."""

  def __reduce__(self) -> tuple[Callable, tuple[str]]:
    return os.system, ('touch unpickled',)


def exported(workdir: Path, out: Path, *flags: str) -> Path:
  assert run('export', f'--workdir={workdir}', f'--out={out}', *flags) == 0
  return out


def logits_of(model: Path, tokens: np.ndarray, directory: Path) -> np.ndarray:
  """What the command makes of token ids [B, S], by way of files in the directory: [B, S, V]."""
  ids, out = directory / 'ids.npy', directory / 'out.npy'
  np.save(ids, tokens)
  assert run('logits', f'--model={model}', f'--tokens={ids}', f'--out={out}') == 0
  return np.load(out)
