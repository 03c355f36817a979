"""Every file in configs/ is an experiment that could start; recipes have the figures of what they
reproduce."""

import dataclasses
import functools
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from moejax.config import flags
from moejax.config.schedule import piecewise
from moejax.data.batch import make_batch
from moejax.sharding.mesh import MESH_AXES
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import Parameters, count_parameters
from moejax.train.initial_state import differences
from moejax.train.optimizer import learning_rate
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import train_step
from tests.support.trainer_process import environment, spawn

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').glob('*.py'))
RECIPES = [file for file in FILES if file != 'configs/tiny.py']


def names() -> list[str]:
  """FILE, and FILE:VARIANT for each variant."""
  found = []
  for file in FILES:
    hints = runpy.run_path(str(ROOT / file))['get_config'].__annotations__
    found += [
      f'{file}:{name}'.rstrip(':')
      for name in (get_args(hints['variant']) if 'variant' in hints else ('',))
    ]
  return found


@functools.cache
def config_of(name: str) -> ExperimentConfig:
  return flags.parse_flags([f'--config={ROOT / name}'], ExperimentConfig, '')


@functools.cache
def state_of(name: str) -> TrainState:
  cfg = config_of(name)
  model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 2048)
  return jax.eval_shape(functools.partial(init_state, dataclasses.replace(cfg, model=model)))


@functools.cache
def parameters_of(name: str) -> Parameters:
  return count_parameters(state_of(name).model, config_of(name))


@pytest.mark.parametrize('name', names())
def test_every_config_makes_a_state_that_its_mesh_divides(name: str) -> None:
  cfg, mesh = config_of(name), config_of(name).mesh
  sizes = (mesh.data or 1, mesh.fsdp, mesh.expert, mesh.tensor)
  shards, rows = sizes[0] * sizes[1] * sizes[2], cfg.batch_size // cfg.micro_batches
  assert rows % shards == 0
  mesh = AbstractMesh(sizes, MESH_AXES)
  assert (
    sum(bytes_on_device(tree, mesh) for tree in (state_of(name).model, state_of(name).opt_state))
    < 20 * 2**30
  )


def test_the_docstring_of_a_file_has_its_commands_and_no_run_directory_is_anothers() -> None:
  for name in names():
    said = runpy.run_path(str(ROOT / name.partition(':')[0]))['__doc__']
    assert 'Hardware: ' in said and (f'--config={name}' in said or name == 'configs/tiny.py'), name
  workdirs = [config_of(name).workdir for name in names()]
  assert len({*workdirs}) == len(workdirs)


@pytest.mark.parametrize(
  ('file', 'total', 'active'),
  [('configs/deepseek_v3.py', 671.0, 37.6), ('configs/openpangu_ultra_moe.py', 719.1, 40.4)],
)
def test_recipes_are_of_the_published_size(file: str, total: float, active: float) -> None:
  count = parameters_of(file)
  assert (
    round((count.total - count.mtp) / 1e9, 1) == total and round(count.active / 1e9, 1) == active
  )
  assert 1e6 < parameters_of(f'{file}:tiny').total < 4e6


SIZES = {
  'vocab_size',
  'd_model',
  'num_layers',
  'num_dense_layers',
  'd_ff',
  'attention.num_heads',
  'attention.num_kv_heads',
  'attention.d_head',
  *(f'attention.latent.{name}' for name in ('kv_rank', 'q_rank', 'd_rope', 'd_value')),
  'moe.d_expert',
  *(f'moe.router.{name}' for name in ('num_experts', 'top_k', 'num_groups', 'top_groups')),
}


@pytest.mark.parametrize('file', RECIPES)
def test_tiny_variants_have_every_part_of_the_recipe(file: str) -> None:
  big, small = config_of(file), config_of(f'{file}:tiny')
  assert {
    line.split('=')[0].removeprefix('model.') for line in differences(small.model, big.model)
  } <= SIZES
  for model in (big.model, small.model):
    router = model.moe.router
    assert model.num_dense_layers and model.mtp_depth == 1 and model.moe.num_shared == 1
    assert model.attention.latent.kv_rank and model.attention.latent.q_rank
    assert router.score_fn == 'sigmoid' and router.renormalise and router.scale == 2.5
    assert model.init.rule == big.model.init.rule and model.moe.dispatch.capacity_factor == 0
  assert (small.model.moe.router.num_groups > 1) == (big.model.moe.router.num_groups > 1)
  assert (
    small.balance.active() == big.balance.active()
    and small.balance.bias_rule == big.balance.bias_rule
  )
  for name in (
    'schedule',
    'phases',
    'final_fraction',
    'beta1',
    'beta2',
    'weight_decay',
    'clip_norm',
  ):
    assert getattr(small.optim, name) == getattr(big.optim, name)


def at(tokens: float, cfg: ExperimentConfig) -> jax.Array:
  """The step at which so many tokens have been seen."""
  return jnp.int32(round(tokens / (cfg.batch_size * cfg.seq_len)))


def test_deepseeks_schedules_are_the_reports() -> None:
  """Section 4.2: 14.8T tokens; the figures are at what it says of tokens, and between, of a
  cosine's shape."""
  cfg = config_of('configs/deepseek_v3.py')
  assert abs(cfg.steps * cfg.batch_size * cfg.seq_len / 14.8e12 - 1) < 1e-5
  optim = cfg.optim
  assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
  assert (cfg.model.init.std, cfg.model.init.rule, cfg.model.init.embed_std, cfg.seq_len) == (
    0.006,
    'normal',
    0,
    4096,
  )
  rate = jax.jit(learning_rate(optim, cfg.steps))
  mtp, bias, sequence = (
    jax.jit(piecewise(spec, cfg.steps))
    for spec in (cfg.loss.mtp_coef, cfg.balance.bias_rate, cfg.balance.losses['sequence'])
  )
  half = (2.2e-4 + 2.2e-5) / 2
  for tokens, want in (
    (1e12, 2.2e-4),
    (9.99e12, 2.2e-4),
    (12.15e12, half),
    (14.301e12, 2.2e-5),
    (14.632e12, 2.2e-5),
    (14.634e12, 7.3e-6),
    (14.8e12, 7.3e-6),
  ):
    np.testing.assert_allclose(rate(at(tokens, cfg)), want, rtol=1e-3, err_msg=f'{tokens:g}')
  np.testing.assert_allclose(
    [rate(jnp.int32(step)) for step in (0, 999, 1999, 2000)],
    [2.2e-4 / 2000, 1.1e-4, 2.2e-4, 2.2e-4],
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    [mtp(at(t, cfg)) for t in (0, 9.99e12, 10.01e12, 14.8e12)], [0.3, 0.3, 0.1, 0.1]
  )
  np.testing.assert_allclose(
    [bias(at(t, cfg)) for t in (0, 14.29e12, 14.31e12, 14.8e12)], [1e-3, 1e-3, 0, 0]
  )
  np.testing.assert_allclose([sequence(at(t, cfg)) for t in (0, 14.8e12)], [1e-4, 1e-4])
  assert cfg.balance.bias_rule == 'sign' and cfg.balance.active() == ('sequence',)


def test_openpangus_schedules_and_initialisation() -> None:
  cfg = config_of('configs/openpangu_ultra_moe.py')
  rate, group = (
    jax.jit(learning_rate(cfg.optim, cfg.steps)),
    piecewise(cfg.balance.losses['ep_group'], cfg.steps),
  )
  np.testing.assert_allclose(
    [rate(jnp.int32(step)) for step in (0, 1999, 2000)], [1e-4 / 2000, 1e-4, 1e-4], rtol=1e-4
  )
  np.testing.assert_allclose(rate(jnp.int32(cfg.steps)), 1e-5, rtol=1e-3)
  np.testing.assert_allclose(
    [group(at(19e12 * part, cfg)) for part in (0, 0.09, 0.11, 0.69, 0.71, 1)],
    [0.1, 0.1, 0.01, 0.01, 0.001, 0.001],
    rtol=1e-6,
  )
  std = (2 * 7680 * 61) ** -0.5
  assert (
    cfg.model.stds == (std, std) and cfg.model.init.embed_std == 0.5 and cfg.model.sandwich_norm
  )
  assert (cfg.model.init.attention_gain, cfg.model.init.ffn_gain) == (0.283, 0.432)
  assert cfg.balance.bias_rule == '' and cfg.model.moe.router.num_groups == 1
  # One group of rows is what the devices of one expert axis hold of one micro-batch.
  assert (
    cfg.batch_size // cfg.balance.ep_groups
    == cfg.mesh.expert
    * cfg.batch_size
    // cfg.micro_batches
    // (cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.expert)
  )


@pytest.mark.parametrize('file', RECIPES)
def test_a_tiny_variant_has_a_training_step(file: str) -> None:
  """Traced, not compiled: every part of the recipe fits together, and says what it should."""
  cfg = config_of(f'{file}:tiny')
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=257))
  state = jax.eval_shape(functools.partial(init_state, cfg))
  tokens = jax.ShapeDtypeStruct((cfg.batch_size, cfg.seq_len), jnp.int32)
  rows = jax.eval_shape(make_batch, tokens, tokens)
  after, metrics = jax.eval_shape(functools.partial(train_step, cfg=cfg), state, rows)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  terms = {f'balance/{name}' for name in cfg.balance.active()}
  assert {'lm_loss', 'mtp_loss', *terms} <= metrics.keys()


@pytest.mark.slow
def test_a_tiny_variant_trains_is_killed_goes_on_and_is_exported(tmp_path: Path) -> None:
  """One recipe, as the real commands do it; the other differs in what the tests above look at."""
  file, workdir = 'configs/deepseek_v3.py', tmp_path / 'run'
  command = [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT / file}:tiny',
    f'--workdir={workdir}',
    f'--config.data.cache_dir={tmp_path / "cache"}',
    '--config.data.source=synthetic',
    '--config.batch_size=8',
    '--config.data.tokenizer=bytes',
    '--config.steps=12',
    '--config.seq_len=32',
    '--config.checkpoint.every=6',
    '--config.log_every=1',
    '--config.eval.every=0',
    '--config.eval.sample_tokens=0',
    '--config.data.synthetic_tokens=20000',
  ]
  # One device: that is what a tiny variant is for, and it compiles in a third of the time.
  process = spawn(command)
  while not (workdir / 'checkpoints' / '6').exists():
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process = spawn(command)
  output = process.communicate(timeout=500)[0]
  assert process.returncode == 0 and 'resuming after step 6 ' in output, output
  logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = {row['step']: row['lm_loss'] for row in logged if 'lm_loss' in row}
  assert [*losses] == [*range(1, 13)] and losses[12] < losses[1] - 0.5
  assert all(row['mtp_loss'] > 0 for row in logged if 'lm_loss' in row)
  out = tmp_path / 'published'
  done = subprocess.run(
    [sys.executable, '-m', 'moejax.hf', 'export', f'--workdir={workdir}', f'--out={out}'],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert (
    done.returncode == 0
    and json.loads((out / 'config.json').read_text())['num_nextn_predict_layers'] == 1
  ), done
