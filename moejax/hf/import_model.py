"""Published files to the directory of a run at step 0."""

import dataclasses
import json
import shlex
import time
from pathlib import Path

import jax.numpy as jnp

from moejax.checkpoint.checkpoints import Checkpoints
from moejax.config import ConfigError, check, frozendict, not_one_of
from moejax.data.sources import DataConfig
from moejax.data.special_tokens import ORIGIN_FILE, read_special_tokens
from moejax.hf.export_plan import origin_of
from moejax.hf.logits import ONE_DEVICE, read_published_model
from moejax.hf.progress import print_note, say
from moejax.hf.safetensors.file import MODEL_DTYPES
from moejax.hf.weights import open_published
from moejax.model.config import ModelConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.fit import untrainable
from moejax.moe.bias import BiasState
from moejax.runtime.files import write_whole
from moejax.runtime.multiprocess import fail_together, is_first_process, staged_together
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.run_dir import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, read_tokenizer


def import_model(
  directory: str, out: str, mesh: MeshConfig = ONE_DEVICE, dtype: str = 'float32'
) -> None:
  """Makes `out` the directory of a run whose step 0 is the published model.

  Whatever happens, `out` is whole or not there. Several processes, all of which call this, must
  share the file system of both directories.

  Args:
    directory: has config.json and safetensors.
    out: the directory to make.
    mesh: of the devices that hold the model while it is read.
    dtype: of the parameters, a row of MODEL_DTYPES.

  Raises:
    ConfigError: the model cannot be read as it is, or `out` holds something.
  """
  start = time.monotonic()
  with fail_together(ConfigError, OSError):
    check(not_one_of('--dtype', dtype, MODEL_DTYPES))
    source, target = open_published(directory), Path(out).resolve()
    special = read_special_tokens(directory)
    tokenizer = read_tokenizer(directory, source.cfg.vocab_size)
  cfg = run_config(source.cfg, out, str(target / TOKENIZER_FILE) if tokenizer else '')
  with staged_together(target) as partial:
    model, bias = read_published_model(source, mesh, dtype)
    checkpoints = Checkpoints(partial / CHECKPOINTS, cfg.checkpoint)
    # The momentum of the bias rules begins at zero, as in a new run.
    momentum = jnp.zeros(bias.shape, bias.dtype, device=bias.sharding)
    checkpoints.save(0, {'model': model, 'router': BiasState(bias, momentum)}, {})
    checkpoints.close()
    with fail_together(ConfigError, OSError):
      if is_first_process():
        if tokenizer:
          tokenizer.save(partial / TOKENIZER_FILE)
        special.save(partial)
        files = {CONFIG_FILE: dataclasses.asdict(cfg), ORIGIN_FILE: origin_of(source)._asdict()}
        for name, content in files.items():
          write_whole(partial / name, json.dumps(content, indent=2) + '\n')
  say(f'imported {directory} to {out} in {time.monotonic() - start:.1f} s')
  print_note('\n'.join(next_commands(cfg, out)))


def next_commands(cfg: ExperimentConfig, out: str) -> list[str]:
  """Returns the commands that go on from an import, each whole, as a line for a person.

  cfg: of the import in the directory `out`.
  """
  run, trained = shlex.quote(out), shlex.quote(f'{out.rstrip("/")}-trained')
  has_tokenizer = cfg.data.tokenizer.endswith(TOKENIZER_FILE)
  prompt = '--prompt="Once upon a time"' if has_tokenizer else '--prompt_ids=1,2,3'
  train = f'python train.py --config={run} --workdir={trained} --config.steps=500'
  if not has_tokenizer:
    train += ' --config.data.tokenizer=PATH_OF_ITS_TOKENIZER_JSON'
  unable = untrainable(cfg.model.moe.router)
  return [
    f'sample  python -m moejax.generate --workdir={run} {prompt}',
    f'train   {unable or train}',
  ]


def run_config(model: ModelConfig, workdir: str, tokenizer: str = '') -> ExperimentConfig:
  """Returns the config of a run that holds a model which was not trained here.

  It has no balance losses, no rule that moves the bias, and no steps.
  """
  return ExperimentConfig(
    steps=0,
    workdir=workdir or 'none',
    data=DataConfig(tokenizer=tokenizer) if tokenizer else DataConfig(),
    model=model,
    balance=BalanceConfig(frozendict(), bias_rule=''),
  )
