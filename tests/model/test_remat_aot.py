"""Remat policies in programs compiled ahead of time: which kernels the backward pass runs again."""

import dataclasses
import functools
import re

import jax
import pytest

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.plan.topology import parse_topology
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_step import train_step
from tests.support.absent_chips import needs_compiler

CONFIG = ExperimentConfig(
  batch_size=4,
  seq_len=128,
  mesh=MeshConfig(data=0, fsdp=1),
  model=ModelConfig(
    vocab_size=512,
    d_model=256,
    num_layers=2,
    dtype='bfloat16',
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=128),
    moe=MoEConfig(d_expert=384, router=RouterConfig(num_experts=8, top_k=2)),
  ),
)
# Forward attention, and what makes gate x and up x among the products of experts.
KERNELS = {
  'v5p:2x2x1': (r'%splash_mha_fwd\S* = ', r'%ragged-dot-none\S* = '),
  'h200:1': (r'"__cudnn\$fmha\w*Softmax"', r'"gate_up"'),
}


@pytest.mark.parametrize(
  'topology',
  [
    pytest.param('v5p:2x2x1', marks=needs_compiler('libtpu')),
    pytest.param('h200:1', marks=needs_compiler('jax_cuda13_plugin')),
  ],
)
def test_a_named_kernel_is_not_run_again(topology: str) -> None:
  """Not attention of what is kept for 'attention', and no product of experts with 'experts'."""
  counts = {}
  for remat in ('none', 'experts', 'attention'):
    cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=remat))
    mesh = make_run_mesh(cfg, parse_topology(topology).devices())
    with jax.set_mesh(mesh):
      step = jax.jit(functools.partial(train_step, cfg=cfg))
      lowered = step.lower(sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh))
      options = {'xla_gpu_autotune_level': 0} if topology.startswith('h200') else None
      text = lowered.compile(options).as_text()
    counts[remat] = [len(re.findall(pattern, text)) for pattern in KERNELS[topology]]
  attention, products = counts['none']
  assert attention and products
  assert counts['experts'][0] > attention and counts['experts'][1] == products, counts
  assert counts['attention'][0] == attention and counts['attention'][1] > products, counts
