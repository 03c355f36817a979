"""The tiny training step compiled ahead of time for H200s, and what is in the program."""

import functools
import re

import jax
import pytest

from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.plan.topology import parse_topology
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import train_step
from tests.support.absent_chips import needs_compiler

pytestmark = needs_compiler('jax_cuda13_plugin')


def config(exchange: str, mesh: MeshConfig) -> ExperimentConfig:
  """One layer of eight experts and latent attention, whose heads have 192 channels."""
  latent = LatentConfig(kv_rank=128, q_rank=256, d_rope=64, d_value=128)
  moe = MoEConfig(
    d_expert=384,
    router=RouterConfig(num_experts=8, top_k=2),
    dispatch=DispatchConfig(exchange=exchange),
  )
  model = ModelConfig(
    vocab_size=512,
    d_model=256,
    num_layers=1,
    dtype='bfloat16',
    remat='full',
    moe=moe,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=128, latent=latent),
  )
  return ExperimentConfig(batch_size=16, seq_len=128, mesh=mesh, model=model)


@functools.cache
def compiled_text(exchange: str, sizes: MeshConfig) -> tuple[str, TrainState]:
  """The program of the step for eight H200s, and the state that it takes."""
  cfg = config(exchange, sizes)
  mesh = make_run_mesh(cfg, parse_topology('h200:8').devices())
  with jax.set_mesh(mesh):
    target = sharded_state_shapes(cfg, mesh)
    step = jax.jit(functools.partial(train_step, cfg=cfg), donate_argnums=0)
    lowered = step.lower(target, batch_shapes(cfg, mesh))
    text = lowered.compile({'xla_gpu_autotune_level': 0}).as_text()  # nothing can be timed
  return text, target


MIXED = MeshConfig(data=1, fsdp=2, expert=4)


@pytest.mark.parametrize('exchange', ['gather', 'ragged'])
def test_the_step_of_eight_gpus(exchange: str) -> None:
  """Latent attention is cuDNN's kernel both ways, and tokens are exchanged as the config says."""
  text, target = compiled_text(exchange, MIXED)
  aliases = re.findall(r'\{(\d+)\}: \((\d+), \{\}', text.partition('\n')[0])
  assert aliases == [(str(i), str(i)) for i in range(len(jax.tree.leaves(target)))]
  assert {*re.findall(r'"__cudnn\$fmha(\w+)"', text)} == {'Softmax', 'SoftmaxBackward'}
  assert bool(re.search(r' ragged-all-to-all(-start)?\(', text)) == (exchange == 'ragged')


@pytest.mark.parametrize('sizes', [MIXED, MeshConfig(data=1, fsdp=8)], ids=str)
def test_no_float32_matrix_is_gathered_to_be_updated(sizes: MeshConfig) -> None:
  """Parameters and their moments are float32, and lie in parts; what is gathered is bfloat16.

  But for the router, of eight columns, and the weights of a token's two copies.
  """
  text, _ = compiled_text('gather', sizes)
  gathered = re.findall(r'= (.*) all-gather(?:-start)?\(', text)
  assert gathered
  for shapes in gathered:
    for dimensions in re.findall(r'f32\[([\d,]+)\]', shapes):
      assert int(dimensions.split(',')[-1]) <= 8, shapes
